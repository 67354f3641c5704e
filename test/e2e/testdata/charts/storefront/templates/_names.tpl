{{- define "storefront.name" -}}
{{ .Release.Name }}-{{ .Chart.Name }}
{{- end }}

{{- define "storefront.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "storefront.database" -}}
- name: DATABASE
  value: {{ .Values.database.release }}-ledger.{{ .Release.Namespace }}.svc.cluster.local
- name: DATABASE_USER
  value: {{ .Values.database.user }}
- name: DATABASE_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ .Values.database.release }}-ledger, key: password}}
- name: SCHEMA
  value: {{ .Values.schema | quote }}
{{- end }}
