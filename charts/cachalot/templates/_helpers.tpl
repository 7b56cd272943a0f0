{{- define "cachalot.fullname" -}}
{{- if contains "cachalot" .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-cachalot" .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "cachalot.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "cachalot.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name must be set when serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "cachalot.selectorLabels" -}}
app.kubernetes.io/name: cachalot-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "cachalot.labels" -}}
{{ include "cachalot.selectorLabels" . }}
app.kubernetes.io/component: operator
app.kubernetes.io/part-of: cachalot
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- /* The cluster-wide objects carry the namespace, so that two releases of one name do not share them. */ -}}
{{- define "cachalot.clusterName" -}}
{{- if or (eq .Release.Namespace (include "cachalot.fullname" .)) (eq .Release.Namespace (printf "%s-system" (include "cachalot.fullname" .))) -}}
{{- include "cachalot.fullname" . -}}
{{- else -}}
{{- printf "%s-%s" (include "cachalot.fullname" .) .Release.Namespace -}}
{{- end -}}
{{- end -}}

{{- define "cachalot.image" -}}
{{- if .digest -}}
{{- printf "%s@%s" .repository .digest -}}
{{- else -}}
{{- printf "%s:%s" .repository .tag -}}
{{- end -}}
{{- end -}}
