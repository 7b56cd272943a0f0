package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
)

const dnsIP = "10.96.0.10"

func (n *node) waitReady(c kubernetes.Interface) error {
	return n.waitFor("node "+n.Name+" to be Ready", 90*time.Second, func(ctx context.Context) bool {
		o, err := c.CoreV1().Nodes().Get(ctx, n.Name, metav1.GetOptions{})
		return err == nil && isReady(o)
	})
}

func isReady(o *corev1.Node) bool {
	for _, k := range o.Status.Conditions {
		if k.Type == corev1.NodeReady {
			return k.Status == corev1.ConditionTrue
		}
	}
	return false
}

// waitProxy: Services work once kube-proxy has written its rules.
func (n *node) waitProxy() error {
	return n.waitFor("kube-proxy's rules", 60*time.Second, func(context.Context) bool {
		return run("nft", "get", "element", "ip", "kube-proxy", "cluster-ips", "{ "+apiServiceIP+" }") == nil
	})
}

// addDNS publishes CoreDNS, a process of this machine, as the usual Service kube-dns.
func addDNS(c kubernetes.Interface, address string) error {
	ctx, opt := context.Background(), metav1.CreateOptions{}
	const user = "system:coredns"
	if _, err := c.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: user},
		Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"endpoints", "services", "pods", "namespaces"}, Verbs: []string{"list", "watch"}},
			{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: []string{"list", "watch"}},
		},
	}, opt); err != nil {
		return err
	}
	if _, err := c.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: user},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: user},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: "User", Name: user}},
	}, opt); err != nil {
		return err
	}
	port := func(name string, protocol corev1.Protocol) corev1.ServicePort {
		return corev1.ServicePort{Name: name, Port: 53, Protocol: protocol, TargetPort: intstr.FromInt32(53)}
	}
	if _, err := c.CoreV1().Services("kube-system").Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "kube-dns", Labels: map[string]string{"k8s-app": "kube-dns"}},
		Spec: corev1.ServiceSpec{ // no selector: the endpoint is not a pod
			ClusterIP: dnsIP,
			Ports:     []corev1.ServicePort{port("dns", corev1.ProtocolUDP), port("dns-tcp", corev1.ProtocolTCP)},
		},
	}, opt); err != nil {
		return err
	}
	_, err := c.DiscoveryV1().EndpointSlices("kube-system").Create(ctx, &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: "kube-dns-host", Labels: map[string]string{discoveryv1.LabelServiceName: "kube-dns"}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{address}}},
		Ports: []discoveryv1.EndpointPort{
			{Name: new("dns"), Port: new(int32(53)), Protocol: new(corev1.ProtocolUDP)},
			{Name: new("dns-tcp"), Port: new(int32(53)), Protocol: new(corev1.ProtocolTCP)},
		},
	}, opt)
	return err
}

func nodeCommand(dir *string) *cobra.Command {
	c := &cobra.Command{
		Use: "node", Short: "the real node of a lab: its GPUs, and what it left behind", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(nodeGPUsCommand(dir), &cobra.Command{
		Use: "clean", Short: "clean up after a lab whose supervisor was killed", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			l, err := openLab(*dir)
			if err != nil {
				return err
			}
			if s, err := l.state(); err != nil {
				return err
			} else if s != nil && s.alive() {
				return fmt.Errorf("the lab in %s runs (pid %d): kubelab down --dir %s stops it and cleans up", l.dir, s.PID, l.dir)
			}
			return down(*dir)
		},
	})
	return c
}

func nodeGPUsCommand(dir *string) *cobra.Command {
	g := &gpuSpec{}
	name := ""
	c := &cobra.Command{
		Use: "gpus", Short: "make the real node advertise GPUs that it does not have", Args: cobra.NoArgs,
		Long: `Make the real node advertise ` + gpuResource + ` and the labels of GPU feature discovery. No device is
behind them: containers that ask for a GPU are scheduled and run, without one.`,
		RunE: func(*cobra.Command, []string) error {
			l, err := openLab(*dir)
			if err != nil {
				return err
			}
			s, err := l.running()
			if err != nil {
				return err
			}
			if err := g.check(); err != nil {
				return err
			}
			if name == "" && s.Node == nil {
				return fmt.Errorf("the lab in %s has no real node: start it with kubelab up --node, or add simulated ones with kubelab simulate", l.dir)
			} else if name == "" {
				name = s.Node.Name
			}
			client, err := l.client()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			if err := g.advertise(ctx, client, name); err != nil {
				return err
			}
			fmt.Fprintf(os.Stdout, "node %s advertises %d %s of %d MiB\n", name, g.count, g.product, g.memoryMiB)
			return nil
		},
	}
	g.addFlags(c.Flags(), "count", 1, "GPUs to advertise")
	c.Flags().StringVar(&name, "name", "", "node; default: the real node of the lab")
	return c
}
