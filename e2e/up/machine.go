package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
)

// A program that is needed, and the Debian package that brings it.
type debianPackage struct{ program, name string }

var (
	nodePackages = []debianPackage{
		{"containerd", "containerd"}, {"ctr", "containerd"}, {"runc", "runc"}, {"/usr/lib/cni/bridge", "containernetworking-plugins"},
		{"nft", "nftables"}, {"ip", "iproute2"}, {"/bin/busybox", "busybox-static"},
	}
	imagePackages = []debianPackage{{"buildah", "buildah"}, {"mmdebstrap", "mmdebstrap"}}
)

const (
	needMemoryMiB = 3500
	needDiskMiB   = 12000
	leastGo       = 21 // Go 1.21 and later fetch the toolchain that go.mod names
)

func (s *session) checkMachineStep() step {
	return step{name: "check this machine", run: func() (string, error) {
		system := osRelease("/etc/os-release")
		if system["ID"] != "debian" && os.Geteuid() == 0 && !have("apt-get") {
			return "", fmt.Errorf("this is %s, and only Debian is tried; without apt-get install these yourself: containerd, runc, CNI plugins, nftables, busybox (static), buildah, mmdebstrap", name(system))
		}
		goVersion, err := s.checkGo()
		if err != nil {
			return "", err
		}
		if !have("cargo") {
			return "", fmt.Errorf("cargo is not in $PATH: install Rust with rustup, and keep your $PATH with sudo: sudo env \"PATH=$PATH\" make up%s", cargoElsewhere())
		}
		rust, err := s.output(s.command("rustc", "--version"))
		if err != nil {
			return "", fmt.Errorf("%w (the version is pinned in rust-toolchain.toml; rustup installs it)", err)
		}
		if err := checkDisk(s.lab, needDiskMiB); err != nil {
			return "", err
		}
		memory := memoryMiB()
		if memory < needMemoryMiB {
			return "", fmt.Errorf("%d MiB of memory: building Kubernetes needs %d MiB", memory, needMemoryMiB)
		}
		return fmt.Sprintf("%s, %d cores, %d GiB, %s, %s", name(system), runtime.NumCPU(), memory/1024, short(rust), goVersion), nil
	}}
}

func (s *session) checkGoStep() step {
	return step{name: "check Go", run: s.checkGo}
}

// checkGo: make has found a go that could build this program, so this is about its age.
func (s *session) checkGo() (string, error) {
	v, err := s.output(s.command("go", "env", "GOVERSION"))
	if err != nil {
		return "", fmt.Errorf("Go is needed to build Kubernetes and Helm: %w", err)
	}
	if minor, ok := goMinor(v); ok && minor < leastGo {
		return "", fmt.Errorf("%s is too old: install Go 1.26 or newer", v)
	}
	return v, nil
}

// goMinor reads 26 from go1.26.8; development versions have no number.
func goMinor(version string) (int, bool) {
	parts := strings.Split(strings.TrimPrefix(version, "go1."), ".")
	minor, err := strconv.Atoi(parts[0])
	return minor, err == nil && strings.HasPrefix(version, "go1.")
}

func cargoElsewhere() string {
	if user := os.Getenv("SUDO_USER"); user != "" {
		return fmt.Sprintf(" (it may be in the home of %s)", user)
	}
	return ""
}

func (s *session) packagesStep(lists ...[]debianPackage) step {
	return step{
		name: "install missing Debian packages",
		hint: "apt-get update && apt-get install -y --no-install-recommends " + strings.Join(packageNames(lists...), " "),
		run: func() (string, error) {
			missing := missingPackages(lists...)
			if len(missing) == 0 {
				return "nothing missing", nil
			}
			if os.Geteuid() != 0 {
				return "", fmt.Errorf("missing: %s; installing needs root", strings.Join(missing, " "))
			}
			s.ui.say("%s", strings.Join(missing, " "))
			install := func() error {
				args := append([]string{"install", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=120"}, missing...)
				c := s.command("apt-get", args...)
				c.Env = append(c.Env, "DEBIAN_FRONTEND=noninteractive")
				return s.exec(c)
			}
			if install() != nil { // the package lists may be missing or old
				s.ui.say("apt-get update")
				if err := s.exec(s.command("apt-get", "update")); err != nil {
					return "", err
				}
				s.ui.say("%s", strings.Join(missing, " "))
				if err := install(); err != nil {
					return "", err
				}
			}
			if still := missingPackages(lists...); len(still) > 0 {
				return "", fmt.Errorf("still missing after apt-get: %s", strings.Join(still, " "))
			}
			return strings.Join(missing, " "), nil
		},
	}
}

func packageNames(lists ...[]debianPackage) (names []string) {
	for _, l := range lists {
		for _, p := range l {
			if len(names) == 0 || names[len(names)-1] != p.name {
				names = append(names, p.name)
			}
		}
	}
	return names
}

func missingPackages(lists ...[]debianPackage) (missing []string) {
	for _, l := range lists {
		for _, p := range l {
			absent := !have(p.program)
			if p.name == "busybox-static" && !absent {
				absent = exec.Command("dpkg", "-s", "busybox-static").Run() != nil // busybox alone is not static
			}
			if absent && (len(missing) == 0 || missing[len(missing)-1] != p.name) {
				missing = append(missing, p.name)
			}
		}
	}
	return missing
}

func have(program string) bool {
	_, err := exec.LookPath(program)
	return err == nil
}

func osRelease(path string) map[string]string {
	b, _ := os.ReadFile(path)
	m := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			m[k] = strings.Trim(v, `"'`)
		}
	}
	return m
}

func name(system map[string]string) string {
	if n := strings.TrimSpace(system["NAME"] + " " + system["VERSION_ID"]); n != "" {
		return n
	}
	return "an unknown system"
}

// short cuts "rustc 1.95.0 (abc 2026-01-01)" to its first two words.
func short(version string) string {
	f := strings.Fields(version)
	return strings.Join(f[:min(2, len(f))], " ")
}

func memoryMiB() int {
	b, _ := os.ReadFile("/proc/meminfo")
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "MemTotal:" {
			kib, _ := strconv.Atoi(f[1])
			return kib / 1024
		}
	}
	return 0
}

func checkDisk(dir string, needMiB uint64) error {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return err
	}
	if free := st.Bavail * uint64(st.Bsize) >> 20; free < needMiB {
		return fmt.Errorf("%d MiB free under %s: the build caches, images and the node need %d MiB", free, dir, needMiB)
	}
	return nil
}
