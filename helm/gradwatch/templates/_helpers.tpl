{{- define "gradwatch.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "gradwatch.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "gradwatch.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "gradwatch.selectorLabels" -}}
app.kubernetes.io/name: {{ include "gradwatch.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "gradwatch.labels" -}}
{{ include "gradwatch.selectorLabels" . }}
app.kubernetes.io/component: collector
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* What every object begins with below its kind: dict "root" $ "suffix" "…" */}}
{{- define "gradwatch.metadata" -}}
name: {{ include "gradwatch.fullname" .root }}{{ with .suffix }}-{{ . }}{{ end }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "gradwatch.labels" .root | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "gradwatch.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "gradwatch.tlsSecret" -}}
{{- .Values.tls.existingSecret | default (printf "%s-tls" (include "gradwatch.fullname" .)) -}}
{{- end -}}

{{/* Empty when there is no token. */}}
{{- define "gradwatch.tokenSecret" -}}
{{- if .Values.auth.token.existingSecret -}}
{{- .Values.auth.token.existingSecret -}}
{{- else if .Values.auth.token.generate -}}
{{- include "gradwatch.fullname" . }}-token
{{- end -}}
{{- end -}}

{{- define "gradwatch.tokenKey" -}}
{{- if .Values.auth.token.existingSecret -}}{{ .Values.auth.token.key }}{{- else -}}token{{- end -}}
{{- end -}}

{{/* Empty when there is no policy. */}}
{{- define "gradwatch.policyConfigMap" -}}
{{- if .Values.policy.existingConfigMap -}}
{{- .Values.policy.existingConfigMap -}}
{{- else if .Values.policy.text -}}
{{- include "gradwatch.fullname" . }}-policy
{{- end -}}
{{- end -}}

{{- define "gradwatch.serverName" -}}
{{ include "gradwatch.fullname" . }}.{{ .Release.Namespace }}.svc
{{- end -}}

{{/* Restricted Pod Security, of a container. */}}
{{- define "gradwatch.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}
