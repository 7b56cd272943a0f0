// kubelab is a real Kubernetes for tests and demos in one binary: etcd, the control plane, kubelet,
// kube-proxy and kubectl, compiled from the unmodified upstream modules.
//
// Every component runs as a child process of the same executable. The upstream commands keep global
// state (signal handler, log configuration, feature gates), so they cannot share a process without
// patches; a multi-call binary needs none. The first argument picks the command, and so does argv[0]
// when it is "kubectl".
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
)

func main() {
	if filepath.Base(os.Args[0]) == "kubectl" {
		os.Exit(kubectlMain(os.Args[1:]))
	}
	if len(os.Args) > 1 {
		if run, ok := components[os.Args[1]]; ok {
			os.Exit(run(os.Args[2:]))
		}
	}
	if err := rootCommand().Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "kubelab:", err)
		os.Exit(1)
	}
}

const rootHelp = `A real Kubernetes ` + kubernetesVersion + ` for tests and demos, in one binary.

  kubelab up                 control plane on loopback; needs no root; any number side by side
  kubelab up --node          adds a real node: containerd, kubelet, kube-proxy, DNS (root, Debian)
  kubelab simulate           adds simulated GPU nodes (pods on them do not compute)
  kubelab kubectl get pods   kubectl is built in
  kubelab down               stops everything and removes every trace of it

All state is in one folder (--dir, or $KUBELAB_DIR, or .lab): admin.kubeconfig, logs/, and "ready",
a file that exists while the lab can be used.

A lab is a test bench, not a cluster to rely on: etcd does not sync to disk, priority and fairness
is off, controllers use short periods, and the client limits of controller-manager and scheduler are
raised to ` + clientLimits + ` (upstream: 20/30 and 50/100). Name that in any benchmark.`

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use: "kubelab", Short: "a real Kubernetes for tests, in one binary", Long: rootHelp,
		SilenceErrors: true, SilenceUsage: true, Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.CompletionOptions.DisableDefaultCmd = true
	dir := os.Getenv("KUBELAB_DIR")
	if dir == "" {
		dir = ".lab"
	}
	root.PersistentFlags().StringVar(&dir, "dir", dir, "state folder of the lab; $KUBELAB_DIR sets the default")
	root.AddCommand(upCommand(&dir), downCommand(&dir), statusCommand(&dir), nodeCommand(&dir),
		simulateCommand(&dir), imagesCommand(&dir), kubectlCommand(&dir))
	return root
}
