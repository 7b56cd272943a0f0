package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	// kubernetesVersion must be that of k8s.io/kubernetes in go.mod; a test compares them.
	kubernetesVersion = "v1.36.4"
	serviceCIDR       = "10.96.0.0/16"
	apiServiceIP      = "10.96.0.1"
	clientLimits      = "1000/s with bursts of 2000"
)

// With the default 20/s the controller-manager alone needs 5 s to start, and with the default 50/s the
// scheduler binds 55 pods a second: both would hide whatever a test wants to see.
var raisedLimits = []string{"--kube-api-qps=1000", "--kube-api-burst=2000"}

// controlPlane is what "up" passes to the components.
type controlPlane struct {
	etcdClient, etcdPeer                string // URLs
	schedulerPort, controllerPort       int
	featureGates, runtimeConfig         string
	audit                               bool
	downscaleStabilization, hpaInterval time.Duration
	nodeGrace                           time.Duration
}

func (c controlPlane) gates() []string {
	if c.featureGates == "" {
		return nil
	}
	return []string{"--feature-gates=" + c.featureGates}
}

func (l *lab) apiServerArgs(c controlPlane) []string {
	args := append([]string{
		"--etcd-servers=" + c.etcdClient,
		"--bind-address=" + l.host, "--secure-port=" + strconv.Itoa(l.port),
		"--service-cluster-ip-range=" + serviceCIDR,
		"--authorization-mode=Node,RBAC", "--anonymous-auth=true", "--allow-privileged=true",
		"--client-ca-file=" + l.pki("ca.crt"),
		"--tls-cert-file=" + l.pki("apiserver.crt"), "--tls-private-key-file=" + l.pki("apiserver.key"),
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + l.pki("sa.pub"), "--service-account-signing-key-file=" + l.pki("sa.key"),
		// the aggregation layer: external.metrics.k8s.io, custom.metrics.k8s.io
		"--requestheader-client-ca-file=" + l.pki("front-ca.crt"), "--requestheader-allowed-names=front-proxy-client",
		"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file=" + l.pki("front-client.crt"), "--proxy-client-key-file=" + l.pki("front-client.key"),
		"--kubelet-client-certificate=" + l.pki("admin.crt"), "--kubelet-client-key=" + l.pki("admin.key"),
		"--kubelet-preferred-address-types=InternalIP",
		"--enable-priority-and-fairness=false", "--profiling=false", "--v=1",
	}, c.gates()...)
	if ip := net.ParseIP(l.host); ip == nil || ip.IsLoopback() {
		args = append(args, "--endpoint-reconciler-type=none") // Endpoints may not hold a loopback address
	}
	if c.runtimeConfig != "" {
		args = append(args, "--runtime-config="+c.runtimeConfig)
	}
	if c.audit {
		args = append(args, "--audit-policy-file="+l.path("audit.yaml"), "--audit-log-path="+l.path("audit.log"),
			"--audit-log-maxsize=100000") // MB; whoever reads it from where they were must not lose it to a rotation
	}
	return args
}

func (l *lab) clientArgs(user string, port int) []string {
	k := l.pki(user + ".kubeconfig")
	return append([]string{
		"--kubeconfig=" + k, "--authentication-kubeconfig=" + k, "--authorization-kubeconfig=" + k,
		"--leader-elect=false", "--bind-address=127.0.0.1", "--secure-port=" + strconv.Itoa(port), "--v=1",
	}, raisedLimits...)
}

func (l *lab) controllerManagerArgs(c controlPlane) []string {
	args := append(l.clientArgs("controller-manager", c.controllerPort),
		"--service-account-private-key-file="+l.pki("sa.key"), "--root-ca-file="+l.pki("ca.crt"),
		"--cluster-signing-cert-file="+l.pki("ca.crt"), "--cluster-signing-key-file="+l.pki("ca.key"),
		"--use-service-account-credentials=true", "--controllers=*",
		"--flex-volume-plugin-dir="+l.path("flexvolume"), // the default is made in /usr/libexec
		// short periods: a test should not wait for the defaults
		"--horizontal-pod-autoscaler-sync-period="+c.hpaInterval.String(),
		"--horizontal-pod-autoscaler-initial-readiness-delay=1s",
		"--horizontal-pod-autoscaler-downscale-stabilization="+c.downscaleStabilization.String(),
		"--node-monitor-grace-period="+c.nodeGrace.String(), "--node-monitor-period=2s",
	)
	return append(args, c.gates()...)
}

func (l *lab) schedulerArgs(c controlPlane) []string {
	return append(l.clientArgs("scheduler", c.schedulerPort), c.gates()...)
}

// auditPolicy: the writes of everybody who came as the administrator, also in another's name, but not those of the
// components, nor the leases of nodes, which KWOK renews as the administrator.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
omitManagedFields: true
rules:
- {level: None, namespaces: [kube-node-lease]}
- {level: Metadata, users: [admin], verbs: [create, update, patch, delete, deletecollection]}
`

// startControlPlane returns when the API server is ready.
func (s *supervisor) startControlPlane(c controlPlane) error {
	t := time.Now()
	if c.audit {
		if err := os.WriteFile(s.path("audit.yaml"), []byte(auditPolicy), 0o600); err != nil {
			return err
		}
	}
	if err := s.start("etcd", s.path("etcd"), c.etcdClient, c.etcdPeer); err != nil {
		return err
	}
	if err := s.start("kube-apiserver", s.apiServerArgs(c)...); err != nil {
		return err
	}
	if err := s.waitAPI(); err != nil {
		return err
	}
	s.say("API server ready after %.1f s: %s", time.Since(t).Seconds(), s.url())
	if err := s.start("kube-controller-manager", s.controllerManagerArgs(c)...); err != nil {
		return err
	}
	return s.start("kube-scheduler", s.schedulerArgs(c)...)
}

func (s *supervisor) waitAPI() error {
	ca, err := os.ReadFile(s.pki("ca.crt"))
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	admin, err := tls.LoadX509KeyPair(s.pki("admin.crt"), s.pki("admin.key"))
	if err != nil {
		return err
	}
	client := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{admin}},
	}}
	defer client.CloseIdleConnections()
	return s.waitFor("the API server", 120*time.Second, func(ctx context.Context) bool {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url()+"/readyz", nil)
		if err != nil {
			return false
		}
		answer, err := client.Do(r)
		if err != nil {
			return false
		}
		answer.Body.Close()
		return answer.StatusCode == http.StatusOK
	})
}

// waitServiceAccount: until the controller-manager has made it, no pod can be created.
func (s *supervisor) waitServiceAccount(c kubernetes.Interface) error {
	return s.waitFor("the service account default/default", 60*time.Second, func(ctx context.Context) bool {
		_, err := c.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
		return err == nil
	})
}

// client is the administrator's.
func (l *lab) client() (kubernetes.Interface, error) {
	c, err := clientcmd.BuildConfigFromFlags("", l.path("admin.kubeconfig"))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", l.path("admin.kubeconfig"), err)
	}
	c.QPS, c.Burst = -1, -1 // the lab's API server takes what it can
	return kubernetes.NewForConfig(c)
}
