package main

import (
	"os"
	"path/filepath"
	"strings"
)

// The configuration files of a node. ${...} is filled in by writeConfigs.
var nodeFiles = map[string]string{
	// Everything is kept under the state folder; upstream defaults would leave
	// folders in /run/containerd/runc, /run/netns and /opt/containerd.
	"containerd.toml": `version = 2
root = "${dir}/root"
state = "${dir}/run"
disabled_plugins = [
  "io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.tracing.processor.v1.otlp",
]
[grpc]
  address = "${dir}/containerd.sock"
[debug]
  address = "${dir}/debug.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "${pause}"
  disable_apparmor = true
  restrict_oom_score_adj = true       # root without CAP_SYS_RESOURCE
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "${dir}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
        Root = "${dir}/runc"
`,
	// No ipMasq and no portmap: both leave iptables chains behind. Pods reach the
	// machine, the API and each other; the outside only with --egress.
	"cni/10-kubelab.conflist": `{
  "cniVersion": "0.4.0",
  "name": "${bridge}",
  "plugins": [
    {
      "type": "bridge", "bridge": "${bridge}", "isGateway": true, "ipMasq": false, "hairpinMode": true,
      "ipam": {
        "type": "host-local", "dataDir": "${dir}/ipam", "ranges": [[{"subnet": "${subnet}"}]],
        "routes": [{"dst": "0.0.0.0/0"}]
      }
    }
  ]
}
`,
	"kubelet.yaml": `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /${bridge}
containerRuntimeEndpoint: unix://${dir}/containerd.sock
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: ${pki}/ca.crt}}
authorization: {mode: Webhook}
address: ${gw}
port: 10250
healthzPort: 0
readOnlyPort: 0
clusterDNS: [${dns}]
clusterDomain: cluster.local
failSwapOn: false
oomScoreAdj: 0
makeIPTablesUtilChains: false
volumePluginDir: ${dir}/volumeplugins
podLogsDir: ${dir}/podlogs
nodeStatusUpdateFrequency: 4s
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%, nodefs.inodesFree: 1%}
imageGCHighThresholdPercent: 100
`,
	// The conntrack zeros mean "leave the machine's settings alone".
	"kube-proxy.yaml": `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clientConnection: {kubeconfig: ${pki}/kube-proxy.kubeconfig}
hostnameOverride: ${node}
bindAddress: ${gw}
healthzBindAddress: ${gw}:10256
metricsBindAddress: ${gw}:10249
clusterCIDR: ${subnet}
detectLocalMode: ClusterCIDR
nodePortAddresses: ["${gw}/32"]
oomScoreAdj: 0
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
nftables: {minSyncPeriod: 100ms, syncPeriod: 30s}
`,
	"Corefile": `.:53 {
    bind ${gw}
    errors
    ready ${gw}:8181
    kubernetes cluster.local in-addr.arpa ip6.arpa {
        kubeconfig ${pki}/coredns.kubeconfig
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
        ttl 2
    }
    ${forward}
    cache 2
}
`,
}

// renderConfigs fills the variables in.
func (n *node) renderConfigs() map[string]string {
	vars := map[string]string{
		"dir": n.dir, "pki": n.pki(""), "bridge": n.Bridge, "node": n.Name, "subnet": n.Subnet,
		"gw": n.gateway(), "dns": dnsIP, "pause": pauseImage, "forward": forwardLine(resolvConf),
	}
	files := map[string]string{}
	for name, text := range nodeFiles {
		files[name] = os.Expand(text, func(k string) string { return vars[k] })
	}
	return files
}

const resolvConf = "/etc/resolv.conf"

// forwardLine: CoreDNS does not start when it is told to ask the servers of a file that names none.
func forwardLine(resolvConf string) string {
	b, _ := os.ReadFile(resolvConf)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "nameserver" {
			return "forward . " + resolvConf
		}
	}
	return "# " + resolvConf + " names no server: only cluster names resolve"
}

func (n *node) writeConfigs() error {
	for name, text := range n.renderConfigs() {
		f := filepath.Join(n.dir, name)
		if err := os.MkdirAll(filepath.Dir(f), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}
