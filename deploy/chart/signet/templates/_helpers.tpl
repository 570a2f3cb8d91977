{{- define "signet.labels" -}}
app.kubernetes.io/name: {{ . }}
app.kubernetes.io/part-of: signet
{{- end }}

{{- define "signet.image" -}}
{{- $own := index .root.Values .part "image" -}}
{{- if $own }}{{ $own }}{{ else }}{{ .root.Values.image.repository }}/signet-{{ .part }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "signet.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "signet.probes" -}}
startupProbe:
  httpGet: {path: /livez, port: http}
  periodSeconds: 1
  failureThreshold: 120
livenessProbe:
  httpGet: {path: /livez, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: http}
  periodSeconds: 2
  timeoutSeconds: 5
{{- end }}

{{- define "signet.locked" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
readOnlyRootFilesystem: true
{{- end }}

{{- /* Go collects in time what it would otherwise be ended for. Of a container's resources. */}}
{{- define "signet.memory" -}}
{{- if dig "limits" "memory" "" . -}}
- name: GOMEMLIMIT
  valueFrom: {resourceFieldRef: {resource: limits.memory}}
{{- end }}
{{- end }}
