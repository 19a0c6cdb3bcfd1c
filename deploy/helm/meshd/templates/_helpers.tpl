{{- define "meshd.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end }}

{{- /* Name of the etcd that this release brings; "" with etcd.endpoints. */}}
{{- define "meshd.etcdName" -}}
{{- if not .Values.etcd.endpoints }}{{ .Release.Name }}-etcd{{ end }}
{{- end }}

{{- define "meshd.cluster" -}}
{{ required "sync.cluster is required: the cluster's name in the mesh" .Values.sync.cluster }}
{{- end }}

{{- /* What a distribution of Kubernetes has elsewhere. */}}
{{- define "meshd.distribution" -}}
{{- $chained := ne .Values.cni.chain "" }}
{{- $k3s := dict "host" "127.0.0.1" "port" "6444" "network" "10.42.0.0/16" }}
{{- if $chained }}
{{- $k3s = merge (dict "binDir" "/var/lib/rancher/k3s/data/cni" "confDir" "/var/lib/rancher/k3s/agent/etc/cni/net.d") $k3s }}
{{- end }}
{{- $all := dict
  "" dict
  "kubeadm" dict
  "kind" dict
  "k3s" $k3s
  "rke2" (dict "host" "127.0.0.1" "port" "6443" "network" "10.42.0.0/16")
  "k0s" (dict "etcdNodes" "kubernetes.io/hostname")
  "talos" (dict "host" "localhost" "port" "7445") }}
{{- if not (hasKey $all .Values.distribution) }}
{{- fail (printf "distribution %q: must be kubeadm, k3s, rke2, k0s, talos, kind or empty" .Values.distribution) }}
{{- end }}
{{- merge (get $all .Values.distribution) (dict "binDir" "/opt/cni/bin" "confDir" "/etc/cni/net.d" "host" "" "port" ""
  "network" "10.244.0.0/16" "etcdNodes" "node-role.kubernetes.io/control-plane") | toJson }}
{{- end }}

{{- /* How a program reaches etcd, as environment variables. */}}
{{- define "meshd.etcdEnv" -}}
- {name: MESHD_ETCD_PREFIX, value: {{ .Values.etcd.prefix | quote }}}
{{- if .Values.etcd.endpoints }}
- {name: MESHD_ETCD_ENDPOINTS, value: {{ join "," .Values.etcd.endpoints | quote }}}
{{- else }}
- {name: MESHD_ETCD_ENDPOINTS_FILE, value: /etc/meshd/etcd/endpoints}
{{- end }}
{{- if or .Values.etcd.secretName (include "meshd.etcdName" .) }}
- {name: MESHD_ETCD_CAFILE, value: /etc/meshd/etcd/ca.crt}
{{- if or .Values.etcd.clientCertificate (include "meshd.etcdName" .) }}
- {name: MESHD_ETCD_CERTFILE, value: /etc/meshd/etcd/tls.crt}
- {name: MESHD_ETCD_KEYFILE, value: /etc/meshd/etcd/tls.key}
{{- end }}
{{- end }}
{{- if .Values.etcd.allowPlaintext }}
- {name: MESHD_ETCD_ALLOW_PLAINTEXT, value: "true"}
{{- end }}
{{- end }}

{{- /* The volume with what that takes, for user "node" or "sync". Pods wait until setup has made it. */}}
{{- define "meshd.etcdVolume" -}}
{{- $root := .root }}
{{- with include "meshd.etcdName" $root }}
- name: etcd
  projected:
    defaultMode: 256
    sources:
      - secret: {name: {{ . }}-{{ $.user }}}
      - configMap: {name: {{ . }}, items: [{key: endpoints, path: endpoints}]}
{{- else }}
{{- with ternary (default $root.Values.etcd.secretName $root.Values.etcd.syncSecretName) $root.Values.etcd.secretName (eq .user "sync") }}
- {name: etcd, secret: {secretName: {{ . }}, defaultMode: 256}}
{{- end }}
{{- end }}
{{- end }}

{{- /* How the API server is reached before Services work, as environment variables. */}}
{{- define "meshd.apiServerEnv" -}}
{{- $distribution := include "meshd.distribution" . | fromJson }}
{{- with default $distribution.host .Values.kubernetesServiceHost }}
- {name: KUBERNETES_SERVICE_HOST, value: {{ . | quote }}}
{{- end }}
{{- with default $distribution.port .Values.kubernetesServicePort }}
- {name: KUBERNETES_SERVICE_PORT, value: {{ . | quote }}}
{{- end }}
{{- end }}

{{- /* Of containers that need no capability. */}}
{{- define "meshd.restricted" -}}
privileged: false
# The files of Secrets and of the host are root's.
runAsUser: 0
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}
