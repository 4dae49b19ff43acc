{{/* The server's pod: of the Deployment, and of a LeaderWorkerSet's leader (and, with another command, its workers). */}}

{{/* Arguments of `sortserve`, as a YAML list. */}}
{{- define "sortserve.args" -}}
{{- $s := .Values.server -}}
- serve
{{- with include "sortserve.modelFolder" . }}
- {{ . }}
{{- end }}
- --host={{ $s.host }}
- --port=8000
{{- with .Values.model.name }}
- --served-model-name={{ . }}
{{- end }}
{{- if .Values.model.ladder }}
- --ladder=/etc/sortserve/ladder.json
{{- end }}
{{- if ne .Values.backend.kind "native" }}
- --backend={{ .Values.backend.kind }}
- --tensor-parallel-size={{ .Values.backend.tensorParallelSize }}
{{- if ne .Values.multiNode.kind "none" }}
- --vllm-arg=distributed_executor_backend=ray
{{- end }}
{{- else }}
- --device={{ ternary "cuda" "cpu" (gt (int .Values.gpu.count) 0) }}
{{- if kindIs "float64" $s.threads }}
- --threads={{ int $s.threads }}
{{- else if kindIs "int64" $s.threads }}
- --threads={{ int $s.threads }}
{{- else if and (ne .Values.model.source "bundled") (eq (int .Values.gpu.count) 0) }}
- --threads=$(CPU_REQUEST)
{{- end }}
- --kv-memory={{ $s.kvMemory }}
{{- end }}
- --dtype={{ $s.dtype }}
{{- with $s.maxModelLen }}
- --max-model-len={{ int . }}
{{- end }}
- --policy={{ $s.policy }}
{{- with $s.fixedSubmodel }}
- --fixed-submodel={{ . }}
{{- end }}
{{- with $s.defaultLatencyBudgetMs }}
- --default-latency-budget-ms={{ . }}
{{- end }}
- --max-batch-tokens={{ int $s.maxBatchTokens }}
- --max-queue={{ int $s.maxQueue }}
- --max-body={{ $s.maxBody }}
{{- if not $s.prefixCache }}
- --no-prefix-cache
{{- end }}
{{- if $s.trustProxyTimeouts }}
- --trust-proxy-timeouts
{{- end }}
{{- range $s.allowOrigins }}
- --allow-origin={{ . }}
{{- end }}
{{- if include "sortserve.keysSecret" . }}
- --keys-file=/etc/sortserve-keys/keys.toml
{{- end }}
- --log-level={{ $s.logLevel }}
- --log-format={{ $s.logFormat }}
{{- if $s.logPrompts }}
- --log-prompts
{{- end }}
- --engine-timeout={{ $s.engineTimeout }}
- --shutdown-timeout={{ int .Values.drain.shutdownSeconds }}
{{- if or (eq $s.metricsCompat "vllm") .Values.inferencePool.enabled }}
- --metrics-compat=vllm
{{- end }}
{{- with $s.otlpEndpoint }}
- --otlp-endpoint={{ . }}
{{- end }}
{{- range $s.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{- define "sortserve.env" -}}
- name: CPU_REQUEST # whole cores, rounded up
  valueFrom:
    resourceFieldRef:
      containerName: server
      resource: requests.cpu
{{- if eq .Values.multiNode.kind "ray" }}
- name: RAY_ADDRESS
  value: {{ .Values.multiNode.ray.address | quote }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "sortserve.volumeMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
- {name: cache, mountPath: /var/cache/sortserve}
{{- if ne .Values.model.source "bundled" }}
- {name: model, mountPath: /models, readOnly: true}
{{- end }}
{{- if .Values.model.ladder }}
- {name: config, mountPath: /etc/sortserve, readOnly: true}
{{- end }}
{{- if include "sortserve.keysSecret" . }}
- {name: keys, mountPath: /etc/sortserve-keys, readOnly: true}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "sortserve.volumes" -}}
- name: tmp
  emptyDir: {sizeLimit: {{ .Values.scratch.tmp }}}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.scratch.shm }}}
- name: cache # of Triton, Inductor and Hugging Face
  emptyDir: {sizeLimit: {{ .Values.scratch.cache }}}
{{- $claim := include "sortserve.claim" . }}
{{- if $claim }}
- name: model
  persistentVolumeClaim:
    claimName: {{ $claim }}
    {{- if eq .Values.model.source "pvc" }}
    readOnly: true
    {{- end }}
{{- else if eq .Values.model.source "download" }}
- name: model
  emptyDir: {sizeLimit: {{ .Values.model.download.size }}}
{{- else if eq .Values.model.source "hostPath" }}
- name: model
  hostPath: {path: {{ .Values.model.hostPath.path }}, type: Directory}
{{- else if eq .Values.model.source "image" }}
- name: model
  image:
    reference: {{ .Values.model.image.reference }}
    pullPolicy: {{ .Values.model.image.pullPolicy }}
{{- end }}
{{- if .Values.model.ladder }}
- name: config
  configMap: {name: {{ include "sortserve.fullname" . }}}
{{- end }}
{{- with include "sortserve.keysSecret" . }}
- name: keys
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Rolls pods when what they read at their start has changed. An existing secret is not ours to read. */}}
{{- define "sortserve.podMetadata" }}
{{- if or .Values.model.ladder .Values.auth.keys .Values.podAnnotations }}
annotations:
  {{- if .Values.model.ladder }}
  checksum/config: {{ include (print $.Template.BasePath "/configmap.yaml") . | sha256sum }}
  {{- end }}
  {{- if .Values.auth.keys }}
  checksum/keys: {{ include (print $.Template.BasePath "/secret.yaml") . | sha256sum }}
  {{- end }}
  {{- with .Values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
labels:
  {{- include "sortserve.selectorLabels" . | nindent 2 }}
  {{- with .Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* Fetches the model once; a folder that is complete is left as it is. */}}
{{- define "sortserve.download" -}}
- name: download
  image: {{ include "sortserve.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command:
    - hf
    - download
    - {{ .Values.model.download.repository | quote }}
    {{- with .Values.model.download.revision }}
    - --revision={{ . }}
    {{- end }}
    - --local-dir={{ include "sortserve.modelFolder" . }}
    - --include=*.json
    - --include=*.safetensors
    - --include=*.jinja
  {{- with .Values.model.download.tokenSecret }}
  {{- if .name }}
  env:
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef: {name: {{ .name }}, key: {{ .key }}}
  {{- end }}
  {{- end }}
  resources:
    requests: {cpu: "1", memory: 512Mi}
    limits: {memory: 2Gi}
  securityContext:
    {{- toYaml .Values.securityContext | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: cache, mountPath: /var/cache/sortserve}
    - {name: model, mountPath: /models}
{{- end }}

{{- define "sortserve.resources" -}}
{{- $resources := deepCopy .Values.resources }}
{{- if gt (int .Values.gpu.count) 0 }}
{{- $resources = merge (dict "limits" (dict .Values.gpu.resourceName (int .Values.gpu.count | toString))) $resources }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/* The server's container, probes and all. */}}
{{- define "sortserve.server" -}}
- name: server
  image: {{ include "sortserve.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  {{- if include "sortserve.leaderWorkerSet" . }}
  command: [sh, -ec]
  args:
    - ray start --head --port={{ .Values.multiNode.ray.port }} --disable-usage-stats && exec sortserve "$@"
    - sortserve
    {{- include "sortserve.args" . | nindent 4 }}
  {{- else }}
  args:
    {{- include "sortserve.args" . | nindent 4 }}
  {{- end }}
  env:
    {{- include "sortserve.env" . | nindent 4 }}
  ports:
    - {name: http, containerPort: 8000}
  # Until the model is loaded nothing else is asked. Then: /ready decides whether requests come here and obeys at once,
  # /health whether the container lives. It answers while the model computes, so half a minute without is no load.
  startupProbe:
    httpGet: {path: /ready, port: http}
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: {{ divf .Values.startup.timeoutSeconds 5 | ceil | int }}
  readinessProbe:
    httpGet: {path: /ready, port: http}
    periodSeconds: 2
    timeoutSeconds: 2
    failureThreshold: 1
  livenessProbe:
    httpGet: {path: /health, port: http}
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: 6
  lifecycle:
    preStop:
      sleep: {seconds: {{ int .Values.drain.preStopSeconds }}}
  resources:
    {{- include "sortserve.resources" . | nindent 4 }}
  securityContext:
    {{- toYaml .Values.securityContext | nindent 4 }}
  volumeMounts:
    {{- include "sortserve.volumeMounts" . | nindent 4 }}
{{- end }}

{{/* What every pod of a replica has, the workers' too. */}}
{{- define "sortserve.podSpec" -}}
serviceAccountName: {{ include "sortserve.serviceAccountName" . }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ add .Values.drain.preStopSeconds .Values.drain.shutdownSeconds .Values.drain.marginSeconds }}
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
{{- if .Values.topologySpreadConstraints }}
  {{- toYaml .Values.topologySpreadConstraints | nindent 2 }}
{{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "sortserve.selectorLabels" . | nindent 8 }}
{{- end }}
{{- if eq .Values.model.source "download" }}
initContainers:
  {{- include "sortserve.download" . | nindent 2 }}
{{- end }}
volumes:
  {{- include "sortserve.volumes" . | nindent 2 }}
{{- end }}
