package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

func imagesCommand(dir *string) *cobra.Command {
	c := &cobra.Command{
		Use: "images", Short: "images of the real node, which has no registry", Args: cobra.NoArgs,
		Long: `Images of the real node. A lab has no registry: import archives, and let pods use them by their
full name (localhost/name:tag) with imagePullPolicy Never or IfNotPresent.`,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(&cobra.Command{
		Use: "import FILE...", Short: "import docker or OCI archives", Args: cobra.MinimumNArgs(1),
		Example: "  buildah push localhost/app:dev docker-archive:app.tar:localhost/app:dev\n  kubelab images import app.tar",
		RunE: func(_ *cobra.Command, files []string) error {
			for _, f := range files {
				if !isFile(f) {
					return fmt.Errorf("%s is not a file: give archives made by buildah push, podman save or docker save", f)
				}
			}
			for _, f := range files {
				t := time.Now()
				abs, err := filepath.Abs(f)
				if err != nil {
					return err
				}
				if err := ctr(*dir, "images", "import", abs); err != nil {
					return fmt.Errorf("importing %s: %w", f, err)
				}
				fmt.Printf("imported %s in %.1f s\n", f, time.Since(t).Seconds())
			}
			return nil
		},
	}, &cobra.Command{
		Use: "list", Short: "list them", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return ctr(*dir, "images", "list") },
	}, &cobra.Command{
		Use: "tag NAME NEW", Short: "give an image one more name", Args: cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, names []string) error {
			return ctr(*dir, "images", "tag", "--force", names[0], names[1])
		},
	}, &cobra.Command{
		Use: "remove NAME...", Short: "remove them", Args: cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, names []string) error {
			return ctr(*dir, append([]string{"images", "remove"}, names...)...)
		},
	})
	return c
}

// ctr runs containerd's client against the node of a running lab.
func ctr(dir string, args ...string) error {
	l, err := openLab(dir)
	if err != nil {
		return err
	}
	s, err := l.running()
	if err != nil {
		return err
	}
	if s.Node == nil {
		return fmt.Errorf("the lab in %s has no real node, so it has no images: start it with kubelab up --node", l.dir)
	}
	if os.Geteuid() != 0 {
		return errors.New("containerd's socket belongs to root: use sudo")
	}
	c := exec.Command("ctr", append([]string{"-a", l.path("node/containerd.sock"), "-n", "k8s.io"}, args...)...)
	var stderr strings.Builder
	c.Stdout, c.Stderr = os.Stdout, &stderr
	if err := c.Run(); err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return nil
}

func kubectlCommand(dir *string) *cobra.Command {
	return &cobra.Command{
		Use: "kubectl ...", Short: "kubectl " + kubernetesVersion + ", pointed at the lab", DisableFlagParsing: true,
		Long: "kubectl, pointed at the lab. A link named kubectl to this program is a plain kubectl.",
		RunE: func(_ *cobra.Command, args []string) error {
			at, args := leadingDir(args, *dir)
			l, err := openLab(at)
			if err != nil {
				return err
			}
			if _, err := os.Stat(l.path("admin.kubeconfig")); err != nil {
				return fmt.Errorf("no lab in %s: start one with kubelab up, or name its folder with kubelab kubectl --dir DIR ...", l.dir)
			}
			if err := os.Setenv("KUBECONFIG", l.path("admin.kubeconfig")); err != nil {
				return err
			}
			os.Exit(kubectlMain(args))
			return nil
		},
	}
}

// leadingDir takes --dir from the front of kubectl's arguments; everything else is kubectl's.
func leadingDir(args []string, dir string) (string, []string) {
	if len(args) > 1 && args[0] == "--dir" {
		return args[1], args[2:]
	}
	if len(args) > 0 {
		if v, ok := strings.CutPrefix(args[0], "--dir="); ok {
			return v, args[1:]
		}
	}
	return dir, args
}
