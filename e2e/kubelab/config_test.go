package main

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	auditv1 "k8s.io/apiserver/pkg/apis/audit/v1"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"
)

func testLab(t *testing.T) *lab {
	t.Helper()
	l, err := openLab(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	l.host, l.port = "127.0.0.1", 6443
	return l
}

func TestCertificatesServeTheAPIAndNameTheirUsers(t *testing.T) {
	l := testLab(t)
	if err := l.writePKI("node-a"); err != nil {
		t.Fatal(err)
	}
	config, err := clientcmd.LoadFromFile(l.path("admin.kubeconfig"))
	if err != nil {
		t.Fatal(err)
	}
	cluster := config.Clusters["kubelab"]
	if cluster.Server != "https://127.0.0.1:6443" {
		t.Errorf("server: %s", cluster.Server)
	}
	ca := x509.NewCertPool()
	if !ca.AppendCertsFromPEM(cluster.CertificateAuthorityData) {
		t.Fatal("no CA in the kubeconfig")
	}
	server := parseCert(t, l.pki("apiserver.crt"))
	for _, name := range []string{"127.0.0.1", apiServiceIP, "kubernetes.default.svc", "localhost"} {
		if _, err := server.Verify(x509.VerifyOptions{Roots: ca, DNSName: name}); err != nil {
			t.Errorf("server certificate for %s: %v", name, err)
		}
	}
	kubelet := parseCert(t, l.pki("kubelet.crt"))
	if kubelet.Subject.CommonName != "system:node:node-a" || !slices.Equal(kubelet.Subject.Organization, []string{"system:nodes"}) {
		t.Errorf("kubelet's subject: %s", kubelet.Subject)
	}
	clientAuth := x509.VerifyOptions{Roots: ca, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if _, err := kubelet.Verify(clientAuth); err != nil {
		t.Error(err)
	}
	if _, err := parseCert(t, l.pki("front-client.crt")).Verify(clientAuth); err == nil {
		t.Error("the front proxy's client is signed by the CA of all clients: anyone could pose as anyone")
	}
}

func parseCert(t *testing.T, path string) *x509.Certificate {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(decodePEM(t, b))
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestALoopbackAPIServerDoesNotReconcileItsEndpoint(t *testing.T) {
	l := testLab(t)
	const off = "--endpoint-reconciler-type=none"
	if !slices.Contains(l.apiServerArgs(controlPlane{}), off) {
		t.Error("on loopback the reconciler fails and must be off")
	}
	l.host = "10.88.77.1"
	if slices.Contains(l.apiServerArgs(controlPlane{}), off) {
		t.Error("on a bridge pods need the endpoint of the Service kubernetes")
	}
}

func TestFeatureGatesReachAllThree(t *testing.T) {
	l, c := testLab(t), controlPlane{featureGates: "A=true"}
	for name, args := range map[string][]string{"apiserver": l.apiServerArgs(c), "controllers": l.controllerManagerArgs(c), "scheduler": l.schedulerArgs(c)} {
		if !slices.Contains(args, "--feature-gates=A=true") {
			t.Errorf("%s has no feature gate", name)
		}
	}
	for _, a := range l.schedulerArgs(controlPlane{}) {
		if strings.HasPrefix(a, "--feature-gates") {
			t.Error("a gate that nobody asked for")
		}
	}
}

func TestWritesAreLoggedOnlyForWhoAsks(t *testing.T) {
	l := testLab(t)
	isAudit := func(a string) bool { return strings.HasPrefix(a, "--audit") }
	if slices.ContainsFunc(l.apiServerArgs(controlPlane{}), isAudit) {
		t.Error("nobody asked for an audit log")
	}
	args := l.apiServerArgs(controlPlane{audit: true})
	for _, want := range []string{"--audit-policy-file=" + l.path("audit.yaml"), "--audit-log-path=" + l.path("audit.log")} {
		if !slices.Contains(args, want) {
			t.Errorf("no %s", want)
		}
	}
	policy := &auditv1.Policy{}
	if err := yaml.UnmarshalStrict([]byte(auditPolicy), policy); err != nil {
		t.Fatal(err)
	}
	if admin := users("n")[0].user; !slices.Contains(policy.Rules[len(policy.Rules)-1].Users, admin) {
		t.Errorf("the policy does not log %s", admin)
	}
}

func testNode(t *testing.T) *node {
	t.Helper()
	n := &node{supervisor: &supervisor{lab: testLab(t)}, nodeState: nodeState{Name: "node-a", Bridge: "kl0", Subnet: "10.88.77.0/24"}, gpus: gpuSpec{product: "NVIDIA-H200", memoryMiB: 143771}}
	n.dir = n.path("node")
	return n
}

func TestNodeConfigurationIsFilledInAndWellFormed(t *testing.T) {
	n := testNode(t)
	files := n.renderConfigs()
	for name, text := range files {
		if strings.Contains(text, "${") || strings.Contains(text, "<no value>") {
			t.Errorf("%s has an empty place", name)
		}
		var parsed map[string]any
		switch filepath.Ext(name) {
		case ".yaml":
			if err := yaml.UnmarshalStrict([]byte(text), &parsed); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		case ".conflist":
			if err := json.Unmarshal([]byte(text), &parsed); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	for name, want := range map[string]string{
		"kubelet.yaml":    "clientCAFile: " + n.pki("ca.crt"),
		"kube-proxy.yaml": "kubeconfig: " + n.pki("kube-proxy.kubeconfig"),
		"containerd.toml": `address = "` + n.socket() + `"`,
		"Corefile":        "bind 10.88.77.1",
	} {
		if !strings.Contains(files[name], want) {
			t.Errorf("%s lacks %q", name, want)
		}
	}
}

func TestDNSWithoutAServerOutsideStillStarts(t *testing.T) {
	f := filepath.Join(t.TempDir(), "resolv.conf")
	for text, want := range map[string]string{
		"nameserver 192.0.2.1\n":           "forward . " + f,
		"# nameserver 192.0.2.1\nsearch a": "# " + f + " names no server: only cluster names resolve",
	} {
		if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := forwardLine(f); got != want {
			t.Errorf("%q: got %q", text, got)
		}
	}
}

func TestWrongNodeFlagsAreNamed(t *testing.T) {
	for want, change := range map[string]func(*node){
		"--bridge":     func(n *node) { n.Bridge = "Bridge With Spaces" },
		"--subnet":     func(n *node) { n.Subnet = "10.88.77.0" },
		"mask":         func(n *node) { n.Subnet = "10.0.0.0/8" },
		"--product":    func(n *node) { n.gpus.product = "NVIDIA H200" },
		"--memory-mib": func(n *node) { n.gpus.memoryMiB = 0 },
		"GPUs":         func(n *node) { n.gpus.count = -1 },
	} {
		n := testNode(t)
		if err := n.checkFlags(); err != nil {
			t.Fatal(err)
		}
		change(n)
		if err := n.checkFlags(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
}

func TestTheGatewayIsTheFirstAddress(t *testing.T) {
	n := testNode(t)
	n.Subnet = "10.88.78.17/24"
	if got := n.gateway(); got != "10.88.78.1" {
		t.Errorf("got %s", got)
	}
}

func TestGPULabelsSayWhatIsKnown(t *testing.T) {
	l := gpuSpec{8, "NVIDIA-H200", 143771}.labels()
	for k, want := range map[string]string{"nvidia.com/gpu.count": "8", "nvidia.com/gpu.product": "NVIDIA-H200", "nvidia.com/gpu.memory": "143771", "nvidia.com/gpu.family": "hopper", "nvidia.com/gpu.compute.major": "9"} {
		if l[k] != want {
			t.Errorf("%s is %q", k, l[k])
		}
	}
	if l := (gpuSpec{1, "NVIDIA-L40S", 46068}).labels(); l["nvidia.com/gpu.family"] != "ada-lovelace" {
		t.Errorf("L40S: %v", l)
	}
	if _, ok := (gpuSpec{1, "Unheard-Of", 1}).labels()["nvidia.com/gpu.family"]; ok {
		t.Error("a family was made up")
	}
}

func TestASimulatedNodeIsKwoksAndKeepsOthersAway(t *testing.T) {
	o := &simulateOptions{gpuSpec: gpuSpec{8, "NVIDIA-H200", 143771}, nodes: 5, prefix: "sim", zones: 2, cpu: "192", memory: "2Ti", pods: 110}
	if err := o.check(); err != nil {
		t.Fatal(err)
	}
	n := o.manifest(4)
	if n.Name != "sim-0004" || n.Annotations[simulatedKey] != simulatedValue || n.Labels["topology.kubernetes.io/zone"] != "zone-1" {
		t.Errorf("got %+v", n.ObjectMeta)
	}
	if len(n.Spec.Taints) != 1 || n.Spec.Taints[0].ToString() != "kwok.x-k8s.io/node=fake:NoSchedule" {
		t.Errorf("taints: %v", n.Spec.Taints)
	}
	if gpus := n.Status.Allocatable[gpuResource]; gpus.Value() != 8 {
		t.Errorf("GPUs: %v", gpus)
	}
	for want, change := range map[string]func(*simulateOptions){
		"--count":  func(o *simulateOptions) { o.nodes = 0 },
		"--prefix": func(o *simulateOptions) { o.prefix = "A b" },
		"--memory": func(o *simulateOptions) { o.memory = "much" },
		"--zones":  func(o *simulateOptions) { o.zones = 0 },
	} {
		bad := *o
		change(&bad)
		if err := bad.check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
}

func TestWrongUpFlagsAreNamed(t *testing.T) {
	for _, o := range []*upOptions{{host: "localhost"}, {host: "127.0.0.1", port: 70000}} {
		if err := o.check(); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
}

func decodePEM(t *testing.T, b []byte) []byte {
	t.Helper()
	block, _ := pem.Decode(b)
	if block == nil {
		t.Fatal("not PEM")
	}
	return block.Bytes
}
