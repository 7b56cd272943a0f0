package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"
)

// Simulated nodes are Node objects with this annotation. KWOK writes their status and that of the pods
// on them; nothing runs. The supervisor starts KWOK when it sees the first one.
const simulatedKey, simulatedValue = "kwok.x-k8s.io/node", "fake"

//go:embed stages.yaml
var kwokStages []byte

type simulateOptions struct {
	gpuSpec
	nodes       int
	prefix      string
	zones       int
	cpu, memory string
	pods        int
	print       bool
	remove      bool
}

const simulateHelp = `Add simulated GPU nodes to a running lab. The scheduler and controllers see them as any other node,
with the labels of GPU feature discovery, but there is no machine behind them: pods bound to them are
reported Running and Ready, and do not compute.

Each carries the annotation kwok.x-k8s.io/node=fake, by which KWOK knows it, and the taint
kwok.x-k8s.io/node=fake:NoSchedule, so that only pods that tolerate it land there. Any Node manifest
with that annotation works as well as this command; --print shows one. Two annotations play faults: a pod
with kubelab/never-ready never answers, and a node with kubelab/silent stays as its status says.`

func simulateCommand(dir *string) *cobra.Command {
	o := &simulateOptions{}
	c := &cobra.Command{
		Use: "simulate", Short: "add simulated GPU nodes (pods on them do not compute)", Long: simulateHelp, Args: cobra.NoArgs,
		Example: "  kubelab simulate --count 4 --gpus 8 --product NVIDIA-H200 --memory-mib 143771\n  kubelab simulate --remove",
		RunE:    func(*cobra.Command, []string) error { return o.run(*dir) },
	}
	f := c.Flags()
	f.IntVar(&o.nodes, "count", 1, "how many nodes")
	o.gpuSpec.addFlags(f, "gpus", 8, "GPUs of each node")
	f.StringVar(&o.prefix, "prefix", "simulated", "the nodes are called <prefix>-0001 and so on")
	f.IntVar(&o.zones, "zones", 1, "spread the nodes over this many topology.kubernetes.io/zone")
	f.StringVar(&o.cpu, "cpu", "192", "CPUs of each node")
	f.StringVar(&o.memory, "memory", "2Ti", "memory of each node")
	f.IntVar(&o.pods, "pods", 110, "most pods of each node")
	f.BoolVar(&o.print, "print", false, "print the manifest instead of creating the nodes; needs no lab")
	f.BoolVar(&o.remove, "remove", false, "remove the simulated nodes that have this --prefix")
	return c
}

func (o *simulateOptions) check() error {
	if err := o.gpuSpec.check(); err != nil {
		return err
	}
	if o.nodes < 1 || o.nodes > 10000 {
		return fmt.Errorf("--count %d: use 1 to 10000", o.nodes)
	}
	if o.zones < 1 || o.pods < 1 {
		return errors.New("--zones and --pods must be at least 1")
	}
	if bad := validation.IsDNS1123Subdomain(o.name(o.nodes)); len(bad) > 0 {
		return fmt.Errorf("--prefix %q cannot begin the name of a node: %s", o.prefix, bad[0])
	}
	for flag, v := range map[string]string{"--cpu": o.cpu, "--memory": o.memory} {
		if _, err := resource.ParseQuantity(v); err != nil {
			return fmt.Errorf("%s %q is not a quantity such as 192 or 2Ti", flag, v)
		}
	}
	return nil
}

func (o *simulateOptions) name(i int) string { return fmt.Sprintf("%s-%04d", o.prefix, i) }

// manifest is the i-th node, counted from 1.
func (o *simulateOptions) manifest(i int) *corev1.Node {
	labels := o.labels()
	labels["type"] = "kwok"
	labels["kubernetes.io/hostname"], labels["kubernetes.io/arch"], labels["kubernetes.io/os"] = o.name(i), "amd64", "linux"
	labels["topology.kubernetes.io/zone"] = "zone-" + strconv.Itoa((i-1)%o.zones)
	r := corev1.ResourceList{
		"cpu": resource.MustParse(o.cpu), "memory": resource.MustParse(o.memory),
		"pods": *resource.NewQuantity(int64(o.pods), resource.DecimalSI), "ephemeral-storage": resource.MustParse("4Ti"),
	}
	if o.count > 0 {
		r[gpuResource] = *resource.NewQuantity(int64(o.count), resource.DecimalSI)
	}
	return &corev1.Node{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Node"},
		ObjectMeta: metav1.ObjectMeta{Name: o.name(i), Labels: labels, Annotations: map[string]string{simulatedKey: simulatedValue}},
		Spec:       corev1.NodeSpec{Taints: []corev1.Taint{{Key: simulatedKey, Value: simulatedValue, Effect: corev1.TaintEffectNoSchedule}}},
		Status:     corev1.NodeStatus{Capacity: r, Allocatable: r},
	}
}

func (o *simulateOptions) run(dir string) error {
	if err := o.check(); err != nil {
		return err
	}
	if o.print {
		for i := range o.nodes {
			y, err := yaml.Marshal(o.manifest(i + 1))
			if err != nil {
				return err
			}
			fmt.Printf("---\n%s", y)
		}
		return nil
	}
	l, err := openLab(dir)
	if err != nil {
		return err
	}
	if _, err := l.running(); err != nil {
		return err
	}
	c, err := l.client()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if o.remove {
		return o.removeAll(ctx, c)
	}
	t := time.Now()
	if err := o.createAll(ctx, c); err != nil {
		return err
	}
	if err := o.waitReady(ctx, c, l); err != nil {
		return err
	}
	fmt.Printf("%d simulated nodes with %d %s each are Ready after %.1f s (pods on them do not compute)\n", o.nodes, o.count, o.product, time.Since(t).Seconds())
	return nil
}

// parallel calls f for 0 to n-1 from a few goroutines and returns the first error.
func parallel(n int, f func(int) error) error {
	work := make(chan int)
	errs := make(chan error, n)
	var wg sync.WaitGroup
	for range min(n, 32) {
		wg.Go(func() {
			for i := range work {
				if err := f(i); err != nil {
					errs <- err
				}
			}
		})
	}
	for i := range n {
		work <- i
	}
	close(work)
	wg.Wait()
	close(errs)
	return <-errs
}

func (o *simulateOptions) createAll(ctx context.Context, c kubernetes.Interface) error {
	return parallel(o.nodes, func(i int) error {
		_, err := c.CoreV1().Nodes().Create(ctx, o.manifest(i+1), metav1.CreateOptions{})
		if err != nil {
			return fmt.Errorf("%w (remove the old ones with --remove, or choose another --prefix)", err)
		}
		return nil
	})
}

func (o *simulateOptions) waitReady(ctx context.Context, c kubernetes.Interface, l *lab) error {
	limit := time.Now().Add(30*time.Second + time.Duration(o.nodes)*100*time.Millisecond)
	for {
		list, err := o.list(ctx, c)
		if err != nil {
			return err
		}
		ready := 0
		for i := range list {
			if isReady(&list[i]) {
				ready++
			}
		}
		if ready >= o.nodes {
			return nil
		}
		if time.Now().After(limit) {
			return fmt.Errorf("%d of %d simulated nodes are Ready: is KWOK there? see %s and %s", ready, o.nodes, l.log("kubelab"), l.log("kwok"))
		}
		time.Sleep(200 * time.Millisecond)
	}
}

func (o *simulateOptions) list(ctx context.Context, c kubernetes.Interface) ([]corev1.Node, error) {
	all, err := c.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: "type=kwok"})
	if err != nil {
		return nil, err
	}
	var mine []corev1.Node
	for _, n := range all.Items {
		if strings.HasPrefix(n.Name, o.prefix+"-") && n.Annotations[simulatedKey] == simulatedValue {
			mine = append(mine, n)
		}
	}
	return mine, nil
}

func (o *simulateOptions) removeAll(ctx context.Context, c kubernetes.Interface) error {
	mine, err := o.list(ctx, c)
	if err != nil {
		return err
	}
	err = parallel(len(mine), func(i int) error { return c.CoreV1().Nodes().Delete(ctx, mine[i].Name, metav1.DeleteOptions{}) })
	if err != nil {
		return err
	}
	fmt.Printf("%d simulated nodes removed\n", len(mine))
	return nil
}

// waitSimulated closes found when the first simulated node is there.
func waitSimulated(ctx context.Context, c kubernetes.Interface, found chan<- struct{}) {
	for ctx.Err() == nil {
		nodes, err := c.CoreV1().Nodes().List(ctx, metav1.ListOptions{ResourceVersion: "0"})
		if err == nil {
			for _, n := range nodes.Items {
				if n.Annotations[simulatedKey] == simulatedValue {
					close(found)
					return
				}
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(500 * time.Millisecond):
		}
	}
}

func (o *upOptions) kwokProgram() string { return program(o.kwok, "kwok") }

func (s *supervisor) startKwok(bin string) error {
	if bin == "" {
		return errors.New("kwok is neither beside kubelab nor in $PATH, and --kwok is not given")
	}
	ports, err := freePorts(1)
	if err != nil {
		return err
	}
	if err := os.WriteFile(s.path("kwok.yaml"), kwokStages, 0o600); err != nil {
		return err
	}
	port := strconv.Itoa(ports[0])
	s.say("simulated nodes found: starting KWOK")
	return s.startProgram("kwok", bin, "--kubeconfig="+s.path("admin.kubeconfig"), "--config="+s.path("kwok.yaml"),
		"--manage-all-nodes=false", "--manage-nodes-with-annotation-selector="+simulatedKey+"="+simulatedValue,
		"--cidr=10.244.0.0/16", "--node-ip=10.0.0.1", "--node-lease-duration-seconds=40",
		"--node-port="+port, "--server-address=127.0.0.1:"+port) // the default listens on all addresses
}
