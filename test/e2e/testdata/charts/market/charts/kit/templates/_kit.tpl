{{- define "kit.name" -}}
{{ .Release.Name }}-{{ .Chart.Name }}
{{- end }}

{{- define "kit.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* kit.ask NAME PORT is a shell command that prints a page. */}}
{{- define "kit.ask" -}}
printf 'GET / HTTP/1.0\r\n\r\n' | timeout 5 nc $(nslookup {{ index . 0 }} | sed -n '/^Name/,$ s/^Address[^:]*: *//p' | head -n 1) {{ index . 1 }} | tail -n 1
{{- end }}

{{- define "kit.server" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "kit.name" . }}
spec:
  selector: {{- include "kit.labels" . | nindent 4 }}
  ports:
  - {name: http, port: {{ .Values.port }}}
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "kit.name" . }}
  labels: {{- include "kit.labels" . | nindent 4 }}
spec:
  selector:
    matchLabels: {{- include "kit.labels" . | nindent 6 }}
  template:
    metadata:
      labels: {{- include "kit.labels" . | nindent 8 }}
    spec:
      terminationGracePeriodSeconds: 5
      containers:
      - name: server
        image: {{ .Values.global.image }}
        command:
        - sh
        - -ec
        - |
          mkdir /tmp/www
          echo "$GOODS of $TOWN" >/tmp/www/index.html
          httpd -f -p {{ .Values.port }} -h /tmp/www &
          trap 'kill $!' TERM
          wait
        env:
        - {name: GOODS, value: {{ .Values.goods }}}
        - {name: TOWN, value: {{ .Values.global.town }}}
        resources: {requests: {cpu: 20m}}
        readinessProbe: {httpGet: {path: /, port: {{ .Values.port }}}}
{{- end }}
