{{- define "gardener.name" -}}
{{ .Release.Name }}-{{ .Chart.Name }}
{{- end }}

{{- /* Objects of the whole cluster are named after the namespace too. */}}
{{- define "gardener.clusterName" -}}
{{ .Release.Namespace }}-{{ include "gardener.name" . }}
{{- end }}
