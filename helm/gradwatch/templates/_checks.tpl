{{/* What the schema cannot say: values that only together are wrong. */}}
{{- define "gradwatch.checks" -}}
{{- if not (or .Values.tls.existingSecret .Values.tls.certManager.enabled) -}}
{{- fail "\n\ngradwatch: no TLS: the collector listens for others, which it refuses to do without.\nSet tls.existingSecret to a Secret with tls.crt, tls.key and ca.crt, or tls.certManager.enabled to true.\n" -}}
{{- end -}}
{{- if not (or (include "gradwatch.tokenSecret" .) .Values.auth.identities.existingSecret) -}}
{{- fail "\n\ngradwatch: no token: whoever reaches the collector could move jobs.\nSet auth.token.generate to true, or auth.token.existingSecret or auth.identities.existingSecret to a Secret.\n" -}}
{{- end -}}
{{- if and .Values.policy.text .Values.policy.existingConfigMap -}}
{{- fail "\n\ngradwatch: two policies: set policy.text or policy.existingConfigMap, not both.\n" -}}
{{- end -}}
{{- with .Values.policy.text -}}
{{- $policy := fromYaml . -}}
{{- if or (hasKey $policy "Error") (ne (toString $policy.apiVersion) "gradwatch/v1") -}}
{{- fail "\n\ngradwatch: policy.text is not a policy file: it must be YAML with `apiVersion: gradwatch/v1`.\nSee what is wrong with `gradwatch policy check FILE`.\n" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.webhook.url (not .Values.webhook.existingSecret) -}}
{{- fail "\n\ngradwatch: a webhook that nobody could trust: set webhook.existingSecret to a Secret with what signs it.\n" -}}
{{- end -}}
{{- if and .Values.webhook.url .Values.networkPolicy.enabled (not .Values.networkPolicy.egress) -}}
{{- fail "\n\ngradwatch: the NetworkPolicy lets nothing out, so the webhook would never be told: set networkPolicy.egress (and let DNS out, too).\n" -}}
{{- end -}}
{{- if and .Values.serviceMonitor.enabled (not (or .Values.serviceMonitor.tokenSecret.name (include "gradwatch.tokenSecret" .))) -}}
{{- fail "\n\ngradwatch: Prometheus has nothing to show: with identities alone, set serviceMonitor.tokenSecret.name to a Secret with a viewer's token.\n" -}}
{{- end -}}
{{- end -}}
