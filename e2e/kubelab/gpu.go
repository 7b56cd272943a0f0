package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/kubernetes"
)

const gpuResource = "nvidia.com/gpu"

// gpuSpec is what a node of the lab advertises. No lab has a GPU.
type gpuSpec struct {
	count     int
	product   string
	memoryMiB int
}

func (g *gpuSpec) addFlags(f *pflag.FlagSet, countFlag string, count int, countHelp string) {
	f.IntVar(&g.count, countFlag, count, countHelp)
	f.StringVar(&g.product, "product", "NVIDIA-H200", "label nvidia.com/gpu.product")
	f.IntVar(&g.memoryMiB, "memory-mib", 143771, "label nvidia.com/gpu.memory, for each GPU")
}

func (g gpuSpec) check() error {
	if g.count < 0 || g.count > 1024 {
		return fmt.Errorf("%d GPUs on a node: use 0 to 1024", g.count)
	}
	if bad := validation.IsValidLabelValue(g.product); len(bad) > 0 || g.product == "" {
		return fmt.Errorf("--product %q cannot be a label value, such as NVIDIA-H200: %s", g.product, strings.Join(bad, "; "))
	}
	if g.memoryMiB <= 0 {
		return fmt.Errorf("--memory-mib %d: a GPU has more than 0 MiB", g.memoryMiB)
	}
	return nil
}

// gpuFamilies: part of a product name, family, compute capability.
var gpuFamilies = [][4]string{
	{"GB300", "blackwell", "10", "3"}, {"B300", "blackwell", "10", "3"}, {"GB200", "blackwell", "10", "0"}, {"B200", "blackwell", "10", "0"},
	{"GH200", "hopper", "9", "0"}, {"H200", "hopper", "9", "0"}, {"H100", "hopper", "9", "0"}, {"H800", "hopper", "9", "0"}, {"H20", "hopper", "9", "0"},
	{"L40", "ada-lovelace", "8", "9"}, {"L4", "ada-lovelace", "8", "9"}, {"A100", "ampere", "8", "0"}, {"A10", "ampere", "8", "6"}, {"T4", "turing", "7", "5"},
}

// labels are those that NVIDIA's GPU feature discovery would set. A product that is not in the table
// gets no family and no compute capability, rather than wrong ones.
func (g gpuSpec) labels() map[string]string {
	l := map[string]string{
		"nvidia.com/gpu.present": "true", "nvidia.com/gpu.count": strconv.Itoa(g.count), "nvidia.com/gpu.product": g.product,
		"nvidia.com/gpu.memory": strconv.Itoa(g.memoryMiB), "nvidia.com/gpu.replicas": "1", "nvidia.com/gpu.sharing-strategy": "none",
		"nvidia.com/gpu.mode": "compute",
	}
	for _, f := range gpuFamilies {
		if strings.Contains(g.product, f[0]) {
			l["nvidia.com/gpu.family"], l["nvidia.com/gpu.compute.major"], l["nvidia.com/gpu.compute.minor"] = f[1], f[2], f[3]
			break
		}
	}
	return l
}

// advertise makes a real node offer GPUs it does not have. Kubelet keeps a resource it does not know.
func (g gpuSpec) advertise(ctx context.Context, c kubernetes.Interface, node string) error {
	if g.count == 0 {
		return nil
	}
	labels, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": g.labels()}})
	if err != nil {
		return err
	}
	if _, err := c.CoreV1().Nodes().Patch(ctx, node, types.StrategicMergePatchType, labels, metav1.PatchOptions{}); err != nil {
		return err
	}
	return patchGPUs(ctx, c, node, strconv.Itoa(g.count))
}

func patchGPUs(ctx context.Context, c kubernetes.Interface, node, count string) error {
	r := map[string]string{gpuResource: count}
	status, err := json.Marshal(map[string]any{"status": map[string]any{"capacity": r, "allocatable": r}})
	if err != nil {
		return err
	}
	_, err = c.CoreV1().Nodes().Patch(ctx, node, types.StrategicMergePatchType, status, metav1.PatchOptions{}, "status")
	return err
}

// restoreGPUs: a kubelet that starts again sets resources of unknown device plugins to zero, once. The
// label remembers the number.
func (n *node) restoreGPUs(ctx context.Context, c kubernetes.Interface) {
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(time.Second) {
		o, err := c.CoreV1().Nodes().Get(ctx, n.Name, metav1.GetOptions{})
		if err != nil {
			continue
		}
		want, now := o.Labels["nvidia.com/gpu.count"], o.Status.Allocatable[gpuResource]
		if want != "" && now.String() != want {
			_ = patchGPUs(ctx, c, n.Name, want)
		}
	}
}
