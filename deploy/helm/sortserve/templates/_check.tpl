{{/* What the schema cannot say: values that only make sense together, and texts with a form. Each refusal says what to
set. Included by the workload, so all of it always runs. */}}

{{- define "sortserve.check" -}}
{{- include "sortserve.checkModel" . }}
{{- include "sortserve.checkServer" . }}
{{- include "sortserve.checkGpus" . }}
{{- include "sortserve.checkScaling" . }}
{{- include "sortserve.checkGateway" . }}
{{- end }}

{{- define "sortserve.checkModel" -}}
{{- $model := .Values.model }}
{{- if and (eq $model.source "image") (semverCompare "<1.33.0-0" .Capabilities.KubeVersion.Version) }}
{{- fail (printf "model.source is image, but this cluster is Kubernetes %s and image volumes need 1.33: use pvc, hostPath or download" .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- if and (eq $model.source "image") (not $model.image.reference) }}
{{- fail "model.source is image: set model.image.reference, such as registry.example/models/qwen:1" }}
{{- end }}
{{- if and (eq $model.source "hostPath") (not (hasPrefix "/" $model.hostPath.path)) }}
{{- fail (printf "model.source is hostPath and model.hostPath.path is %q: set it to the absolute path of a folder that every node has" $model.hostPath.path) }}
{{- end }}
{{- if and (eq $model.source "download") (not (regexMatch "^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$" $model.download.repository)) }}
{{- fail (printf "model.source is download and model.download.repository is %q: set it to owner/name, such as Qwen/Qwen2.5-Coder-0.5B-Instruct" $model.download.repository) }}
{{- end }}
{{- if and (has $model.source (list "pvc" "hostPath" "image")) (not $model.path) (not $model.name) }}
{{- fail (printf "model.source is %s with neither model.path nor model.name: clients would have to send \"models\" as the model; set model.name" $model.source) }}
{{- end }}
{{- if or (hasPrefix "/" $model.path) (contains ".." $model.path) }}
{{- fail (printf "model.path is %q: it is a folder inside the volume, such as qwen or team/qwen" $model.path) }}
{{- end }}
{{- end }}

{{- define "sortserve.checkServer" -}}
{{- $server := .Values.server }}
{{- range $name, $size := dict "kvMemory" $server.kvMemory "maxBody" $server.maxBody }}
{{- if not (regexMatch "^[0-9]+(\\.[0-9]+)?([kKmMgGtT]i?)?[bB]?$" $size) }}
{{- fail (printf "server.%s is %q: write a size such as 512MiB or 2GiB" $name $size) }}
{{- end }}
{{- end }}
{{- if and (eq $server.policy "fixed") (not $server.fixedSubmodel) }}
{{- fail "server.policy is fixed: set server.fixedSubmodel to an id of the ladder (`sortserve ladder` lists them)" }}
{{- end }}
{{- if and $server.otlpEndpoint (not (regexMatch "^https?://[^/]+" $server.otlpEndpoint)) }}
{{- fail (printf "server.otlpEndpoint is %q: write an address such as http://collector:4318" $server.otlpEndpoint) }}
{{- end }}
{{- if and .Values.test.apiKeySecret.name (not (include "sortserve.keysSecret" .)) }}
{{- fail "test.apiKeySecret is set, but the server asks for no key: set auth.keys or auth.existingSecret too" }}
{{- end }}
{{- end }}

{{- define "sortserve.checkGpus" -}}
{{- $v := .Values }}
{{- $here := int $v.gpu.count }}
{{- $wanted := int $v.backend.tensorParallelSize }}
{{- if and (gt $here 1) (eq $v.backend.kind "native") }}
{{- fail (printf "gpu.count is %d, but backend.kind native uses one GPU: set gpu.count to 1, or backend.kind to vllm" $here) }}
{{- end }}
{{- if and (gt $wanted 1) (eq $v.backend.kind "native") }}
{{- fail (printf "backend.tensorParallelSize is %d, but backend.kind native uses one device: set backend.kind to vllm" $wanted) }}
{{- end }}
{{- if and (ne $v.multiNode.kind "none") (eq $v.backend.kind "native") }}
{{- fail (printf "multiNode.kind is %s, but backend.kind is native: only vllm runs one replica on several nodes" $v.multiNode.kind) }}
{{- end }}
{{- if and (eq $v.multiNode.kind "none") (eq $v.backend.kind "vllm") (ne $here $wanted) (or (gt $here 0) (gt $wanted 1)) }}
{{- fail (printf "backend.tensorParallelSize is %d, but gpu.count is %d: they must be equal, or spread the replica over nodes with multiNode" $wanted $here) }}
{{- end }}
{{- $group := mul $here (int $v.multiNode.size) | int }}
{{- if and (include "sortserve.leaderWorkerSet" .) (ne $group $wanted) }}
{{- fail (printf "multiNode.size x gpu.count is %d GPUs, but backend.tensorParallelSize is %d: they must be equal" $group $wanted) }}
{{- end }}
{{- if and (eq $v.multiNode.kind "ray") (not $v.multiNode.ray.address) }}
{{- fail "multiNode.kind is ray: set multiNode.ray.address to the cluster's head, such as raycluster-head-svc:6379" }}
{{- end }}
{{- end }}

{{- define "sortserve.checkScaling" -}}
{{- $v := .Values }}
{{- $counts := or (ne $v.autoscaling.kind "none") $v.prometheusRule.enabled }}
{{- if and $counts (ne $v.model.source "bundled") (not $v.model.fullSubmodel) }}
{{- fail "autoscaling and prometheusRule count what is made below the full model: set model.fullSubmodel to its id, d and its number of layers (`sortserve ladder` prints it)" }}
{{- end }}
{{- if ne $v.autoscaling.kind "none" }}
{{- if gt (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas) }}
{{- fail (printf "autoscaling.minReplicas is %d, over autoscaling.maxReplicas, which is %d" (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas)) }}
{{- end }}
{{- if eq $v.server.policy "fixed" }}
{{- fail "server.policy is fixed: no quality is ever given up, so autoscaling would never act; use policy slack, or set autoscaling.kind to none" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "sortserve.checkGateway" -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) }}
{{- fail "httpRoute.enabled is true: set httpRoute.parentRefs to the gateway, such as [{name: gateway, namespace: infra}]" }}
{{- end }}
{{- if and .Values.inferencePool.enabled (not .Values.inferencePool.endpointPicker.name) }}
{{- fail "inferencePool.enabled is true: set inferencePool.endpointPicker.name to the service of the endpoint picker" }}
{{- end }}
{{- end }}
