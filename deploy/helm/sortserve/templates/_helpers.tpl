{{/* Names, labels, and what follows from values in more than one place. */}}

{{- define "sortserve.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "sortserve.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains (include "sortserve.name" .) .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "sortserve.name" .) | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "sortserve.selectorLabels" -}}
app.kubernetes.io/name: {{ include "sortserve.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end }}

{{- define "sortserve.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: {{ include "sortserve.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "sortserve.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "sortserve.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "sortserve.image" -}}
{{- $tag := default (printf "%s-%s" .Chart.AppVersion (ternary "cuda" "cpu" (gt (int .Values.gpu.count) 0))) .Values.image.tag }}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository $tag }}
{{- end }}
{{- end }}

{{/* Secret with the keys file, empty where nobody needs a key. */}}
{{- define "sortserve.keysSecret" -}}
{{- if .Values.auth.existingSecret }}
{{- .Values.auth.existingSecret }}
{{- else if .Values.auth.keys }}
{{- printf "%s-keys" (include "sortserve.fullname" .) }}
{{- end }}
{{- end }}

{{/* Claim with the model, empty where there is none. */}}
{{- define "sortserve.claim" -}}
{{- $stores := or (eq .Values.model.source "pvc") (and (eq .Values.model.source "download") (eq .Values.model.download.storage "pvc")) }}
{{- if $stores }}
{{- default (printf "%s-model" (include "sortserve.fullname" .)) .Values.model.pvc.existingClaim }}
{{- end }}
{{- end }}

{{/* The model's folder in the container, empty for the bundled one. */}}
{{- define "sortserve.modelFolder" -}}
{{- if eq .Values.model.source "download" }}
{{- printf "/models/%s" (default (base .Values.model.download.repository) .Values.model.path) }}
{{- else if ne .Values.model.source "bundled" }}
{{- printf "/models/%s" .Values.model.path | trimSuffix "/" }}
{{- end }}
{{- end }}

{{/* 1 where more than one replica may run. */}}
{{- define "sortserve.several" -}}
{{- $replicas := ternary .Values.replicas .Values.autoscaling.minReplicas (eq .Values.autoscaling.kind "none") }}
{{- if gt (int $replicas) 1 }}1{{ end }}
{{- end }}

{{- define "sortserve.leaderWorkerSet" -}}
{{- if eq .Values.multiNode.kind "leaderWorkerSet" }}1{{ end }}
{{- end }}

{{/* What the full model is called, in the ladder of the bundled model, and in the one that is served. The rules file has the
first; a test holds both to the model. */}}
{{- define "sortserve.bundledFullSubmodel" -}}
d12
{{- end }}

{{- define "sortserve.fullSubmodel" -}}
{{- default (include "sortserve.bundledFullSubmodel" .) .Values.model.fullSubmodel }}
{{- end }}
