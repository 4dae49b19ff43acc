{{/* The same pace for both kinds of autoscaling: up by doubling, down by one. */}}
{{- define "sortserve.behavior" -}}
scaleUp:
  stabilizationWindowSeconds: {{ .Values.autoscaling.scaleUpStabilizationSeconds }}
  selectPolicy: Max
  policies:
    # The share of tokens below the full model says that replicas are short, not by how many: at twice the load it would
    # ask for three times the replicas. Doubling, then looking again, ends nearer to what is needed.
    - {type: Percent, value: 100, periodSeconds: 60}
    - {type: Pods, value: 2, periodSeconds: 60}
scaleDown:
  stabilizationWindowSeconds: {{ .Values.autoscaling.scaleDownStabilizationSeconds }}
  policies:
    - {type: Pods, value: 1, periodSeconds: 300}
{{- end }}

{{- define "sortserve.scaleTarget" -}}
{{- if include "sortserve.leaderWorkerSet" . }}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
{{- else }}
apiVersion: apps/v1
kind: Deployment
{{- end }}
name: {{ include "sortserve.fullname" . }}
{{- end }}

{{/* The label `model` of the release's series. */}}
{{- define "sortserve.modelName" -}}
{{- if .Values.model.name }}
{{- .Values.model.name }}
{{- else }}
{{- default "bundled" (include "sortserve.modelFolder" . | base | trimAll ".") }}
{{- end }}
{{- end }}
