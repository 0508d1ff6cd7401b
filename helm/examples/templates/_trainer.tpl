{{/* What the Pods of all kinds have in common below `spec`; dict "root" $ "name" the container's "command" its words */}}
{{- define "examples.pod" -}}
# All containers of the Pod run as one user: they lock and write the same files.
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .root.Values.job.runAsUser }}
  fsGroup: {{ .root.Values.job.runAsUser }}
# The launcher gives torchrun 40 s, and the sidecar ships for up to 10 s more.
terminationGracePeriodSeconds: 90
automountServiceAccountToken: false
initContainers:
  {{- include "gradwatch.initContainers" .root.Values.job | nindent 2 }}
containers:
  - name: {{ .name }}
    image: {{ .root.Values.trainingImage }}
    command:
      - /gradwatch/bin/gradwatch
      - run
      - --no-sidecar
      - --job=llm-7b
      - --policy=/etc/gradwatch/policy/policy.yaml
      - --
      {{- range .command }}
      - {{ . | quote }}
      {{- end }}
    env:
      {{- include "gradwatch.env" .root.Values.job | nindent 6 }}
    resources:
      limits: {nvidia.com/gpu: 8, memory: 200Gi}
    volumeMounts:
      {{- include "gradwatch.volumeMounts" .root.Values.job | nindent 6 }}
      - {name: checkpoints, mountPath: /ckpts}
volumes:
  {{- include "gradwatch.volumes" .root.Values.job | nindent 2 }}
  # On every node the same folder.
  - name: checkpoints
    persistentVolumeClaim: {claimName: checkpoints}
{{- end -}}

{{/* Of a batch Job; a list of the container's name */}}
{{- define "examples.podFailurePolicy" -}}
podFailurePolicy:
  rules:
    # 93: the policy has halted the job. Not again.
    - action: FailJob
      onExitCodes: {containerName: {{ index . 0 }}, operator: In, values: [93]}
    # 75: a rollback is due, and every Pod of the job has ended with it. Each is replaced, at no cost; the new
    # launchers wait for each other and start from the last good checkpoint.
    - action: Ignore
      onExitCodes: {containerName: {{ index . 0 }}, operator: In, values: [75]}
    # A node that is drained is not the job's fault either.
    - action: Ignore
      onPodConditions:
        - {type: DisruptionTarget, status: "True"}
{{- end -}}
