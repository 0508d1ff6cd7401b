{{/*
Templates for the Pods of training jobs, for this chart's users as a dependency:

  {{- $gradwatch := dict "image" "registry.example/gradwatch:0.1.0" "collector" "gradwatch.monitoring.svc:7700"
        "accessSecret" "gradwatch-access" "runAsUser" 1000 }}
  initContainers:
    {{- include "gradwatch.initContainers" $gradwatch | nindent 4 }}
  containers:
    - name: trainer
      command: [/gradwatch/bin/gradwatch, run, --no-sidecar, --job, llm-7b, --, torchrun, …, train.py]
      env:
        {{- include "gradwatch.env" $gradwatch | nindent 8 }}
      volumeMounts:
        {{- include "gradwatch.volumeMounts" $gradwatch | nindent 8 }}
  volumes:
    {{- include "gradwatch.volumes" $gradwatch | nindent 4 }}

The dict:
  image         of Gradwatch; required.
  collector     HOST:PORT of the collector's gRPC; required.
  accessSecret  a Secret of the job's namespace with `token` and `ca.crt`; required.
  runAsUser     the user of the training container; required, since both lock and write the same files. 0 is root.
  policy        a ConfigMap of the job's namespace with `policy.yaml`; leave out for none.
  checkpoints   {root, layout, volumeMounts}, so that a policy can go back: what the policy file says, and where it is
                mounted. The image must have torch then. Leave out for none.
  pullPolicy    of the image.
  resources     of the sidecar.
*/}}

{{- define "gradwatch.initContainers" -}}
{{ include "gradwatch.bring" . }}
{{ include "gradwatch.sidecar" . }}
{{- end -}}

{{/* Brings the probe and the launcher into an unchanged training image. */}}
{{- define "gradwatch.bring" -}}
- name: gradwatch-bring
  image: {{ include "gradwatch.given" (list . "image") | quote }}
  {{- with .pullPolicy }}
  imagePullPolicy: {{ . }}
  {{- end }}
  command: [cp, -R, /opt/gradwatch/training/., /gradwatch/]
  resources:
    requests: {cpu: 50m, memory: 32Mi}
    limits: {memory: 128Mi}
  securityContext:
    {{- include "gradwatch.jobSecurity" . | nindent 4 }}
  volumeMounts:
    - {name: gradwatch, mountPath: /gradwatch}
{{- end -}}

{{/* A native sidecar: it starts before the training container and is ended after it, so it ships the rest. */}}
{{- define "gradwatch.sidecar" -}}
- name: gradwatch-sidecar
  image: {{ include "gradwatch.given" (list . "image") | quote }}
  {{- with .pullPolicy }}
  imagePullPolicy: {{ . }}
  {{- end }}
  restartPolicy: Always
  command: [gradwatch, sidecar]
  args:
    - --collector={{ include "gradwatch.given" (list . "collector") }}
    - --tls-ca=/etc/gradwatch/access/ca.crt
    - --token-file=/etc/gradwatch/access/token
    {{- with .checkpoints }}
    - --checkpoints-root={{ include "gradwatch.given" (list . "root") }}
    - --checkpoints-layout={{ .layout | default "auto" }}
    {{- end }}
  env:
    {{- include "gradwatch.env" . | nindent 4 }}
    # The root of its file system is read-only.
    - {name: TMPDIR, value: /gradwatch}
  resources:
    {{- if .resources }}
    {{- toYaml .resources | nindent 4 }}
    {{- else }}
    requests: {cpu: 50m, memory: 128Mi}
    limits: {memory: {{ ternary "4Gi" "256Mi" (hasKey . "checkpoints") }}}
    {{- end }}
  securityContext:
    {{- include "gradwatch.jobSecurity" . | nindent 4 }}
  volumeMounts:
    - {name: gradwatch, mountPath: /gradwatch}
    - {name: gradwatch-access, mountPath: /etc/gradwatch/access, readOnly: true}
    {{- with .checkpoints }}
    {{- with .volumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- end }}
{{- end -}}

{{/* For the training container, too. */}}
{{- define "gradwatch.env" -}}
- {name: GRADWATCH_STATE_DIR, value: /gradwatch/state}
# Reports name the node; by itself a Pod knows only its own name.
- name: GRADWATCH_NODE
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
{{- end -}}

{{/* For the training container; it needs nothing of the collector's. */}}
{{- define "gradwatch.volumeMounts" -}}
- {name: gradwatch, mountPath: /gradwatch}
{{- with .policy }}
- {name: gradwatch-policy, mountPath: /etc/gradwatch/policy, readOnly: true}
{{- end }}
{{- end -}}

{{- define "gradwatch.volumes" -}}
- name: gradwatch
  emptyDir: {}
- name: gradwatch-access
  secret:
    secretName: {{ include "gradwatch.given" (list . "accessSecret") }}
{{- with .policy }}
- name: gradwatch-policy
  configMap:
    name: {{ . }}
{{- end }}
{{- end -}}

{{- define "gradwatch.jobSecurity" -}}
runAsUser: {{ include "gradwatch.given" (list . "runAsUser") }}
runAsNonRoot: {{ ne (int .runAsUser) 0 }}
{{ include "gradwatch.containerSecurity" . }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* A value of the dict that cannot be left out: list DICT KEY */}}
{{- define "gradwatch.given" -}}
{{- $dict := index . 0 -}}
{{- $key := index . 1 -}}
{{- if not (hasKey $dict $key) -}}
{{- fail (printf "\n\ngradwatch: the sidecar's templates want %q; see templates/_sidecar.tpl of the chart gradwatch.\n" $key) -}}
{{- end -}}
{{- index $dict $key -}}
{{- end -}}
