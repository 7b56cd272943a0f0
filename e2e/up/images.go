package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// image is one of ours: a binary, files beside it, and a Dockerfile.
type image struct {
	name, binary, dockerfile string
	// models are folders below e2e/models that go to /models in the image.
	models []string
	// tag is the digest of all that is in it; set when it is built.
	tag string
}

var ourImages = []image{
	{name: "cachalot-operator", binary: "operator", dockerfile: "operator/Dockerfile"},
	{name: "cachalot-engine", binary: "engine", dockerfile: "engine/Dockerfile", models: []string{"tiny-r1"}},
}

// modelFiles are what serving needs; scripts, cards and reports stay out of the image.
var modelFiles = []string{"config.json", "generation_config.json", "tokenizer*", "chat_template*", "*.safetensors", "model.safetensors.index.json"}

const (
	basePackages = "libc6,libgcc-s1,ca-certificates,tzdata"
	baseSuite    = "bookworm"
	baseImage    = "localhost/cachalot-base:" + baseSuite
)

func (i image) ref(tag string) string { return "localhost/" + i.name + ":" + tag }
func (i image) archive(s *session) string {
	return filepath.Join(s.imageDir(), i.name+".tar")
}

func (s *session) imageDir() string { return s.labFile("images") }

// imagesStep builds the images from the real Dockerfiles, without a registry: the base is made from
// Debian packages, and buildah keeps to a store of its own.
func (s *session) imagesStep() step {
	return step{name: "build the images", run: func() (string, error) {
		if os.Geteuid() != 0 {
			return "", errors.New("buildah and mmdebstrap need root here: sudo env \"PATH=$PATH\" make images")
		}
		if err := os.MkdirAll(s.imageDir(), 0o755); err != nil {
			return "", err
		}
		base, err := s.baseTar()
		if err != nil {
			return "", err
		}
		var built []string
		s.images = nil
		for _, i := range ourImages {
			digest, err := s.imageDigest(i, base)
			if err != nil {
				return "", err
			}
			i.tag = "dev-" + digest[:12]
			s.images = append(s.images, i)
			stamp := i.archive(s) + ".built"
			if old, _ := os.ReadFile(stamp); string(old) == digest && isFile(i.archive(s)) {
				continue
			}
			s.ui.say("%s", i.name)
			if err := s.buildImage(i, base); err != nil {
				return "", err
			}
			if err := os.WriteFile(stamp, []byte(digest), 0o644); err != nil {
				return "", err
			}
			st, err := os.Stat(i.archive(s))
			if err != nil {
				return "", err
			}
			built = append(built, fmt.Sprintf("%s %d MB", i.name, st.Size()/1e6))
		}
		if len(built) == 0 {
			return "unchanged", nil
		}
		return strings.Join(built, ", "), nil
	}}
}

// baseTar makes the root file system that the Dockerfiles start from: a C library, certificates and
// time zones, no shell. It is made once, and anew when it is removed.
func (s *session) baseTar() (string, error) {
	out := filepath.Join(s.imageDir(), "base-"+baseSuite+".tar")
	if isFile(out) {
		return out, nil
	}
	s.ui.say("base from Debian packages")
	tmp := filepath.Join(s.imageDir(), "base-new.tar")
	// Only extracted, not configured (there is no shell to do it): so the bundle of certificates, which
	// is made at configuration, is made by the hook.
	err := s.exec(s.command("mmdebstrap", "--quiet", "--variant=extract", "--include="+basePackages,
		`--customize-hook=mkdir -p "$1/etc/ssl/certs" && cat "$1"/usr/share/ca-certificates/mozilla/*.crt > "$1/etc/ssl/certs/ca-certificates.crt"`,
		"--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
		"--dpkgopt=path-exclude=/usr/share/lintian/*",
		baseSuite, tmp))
	if err != nil {
		return "", err
	}
	return out, os.Rename(tmp, out)
}

func (s *session) imageDigest(i image, base string) (string, error) {
	h := sha256.New()
	files, err := s.imageFiles(i)
	if err != nil {
		return "", err
	}
	for _, f := range append([]string{s.repoFile(i.dockerfile), base, s.binary(i.binary)}, files...) {
		fmt.Fprintf(h, "%s\x00", filepath.Base(f))
		if err := hashFile(h, f); err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// imageFiles are the model's files, in a fixed order.
func (s *session) imageFiles(i image) ([]string, error) {
	var all []string
	for _, m := range i.models {
		weights := 0
		for _, pattern := range modelFiles {
			found, err := filepath.Glob(s.repoFile(filepath.Join("e2e/models", m, pattern)))
			if err != nil {
				return nil, err
			}
			for _, f := range found {
				if strings.HasSuffix(f, ".safetensors") {
					weights++
				}
			}
			all = append(all, found...)
		}
		if weights == 0 {
			return nil, fmt.Errorf("e2e/models/%s has no *.safetensors: the checkout is not complete", m)
		}
	}
	return all, nil
}

// buildImage stages what the Dockerfile copies and nothing else, builds, and writes an archive.
func (s *session) buildImage(i image, base string) error {
	env, err := s.buildahEnv()
	if err != nil {
		return err
	}
	buildah := func(args ...string) error {
		c := s.command("buildah", args...)
		c.Env = append(c.Env, env...)
		return s.exec(c)
	}
	context := filepath.Join(s.imageDir(), i.name)
	if err := s.stage(i, context); err != nil {
		return err
	}
	defer os.RemoveAll(context)
	defer cleanBuildah()()
	if err := s.importBase(base, env); err != nil {
		return err
	}
	if err := buildah("bud", "--quiet", "--pull-never", "--isolation", "chroot", "--timestamp", "0", "--build-arg", "BASE="+baseImage,
		"--file", s.repoFile(i.dockerfile), "--tag", i.ref("dev"), context); err != nil {
		return err
	}
	if err := os.RemoveAll(i.archive(s)); err != nil { // buildah does not overwrite an archive
		return err
	}
	return buildah("push", "--quiet", i.ref("dev"), "docker-archive:"+i.archive(s)+":"+i.ref("dev"))
}

// importBase puts the base into buildah's store, once.
func (s *session) importBase(base string, env []string) error {
	at := func(args ...string) (string, error) {
		c := s.command("buildah", args...)
		c.Env = append(c.Env, env...)
		return s.output(c)
	}
	if _, err := at("images", "--quiet", baseImage); err == nil {
		return nil
	}
	container, err := at("from", "scratch")
	if err != nil {
		return err
	}
	if _, err := at("add", "--quiet", container, base, "/"); err != nil {
		return err
	}
	if _, err := at("commit", "--quiet", "--rm", container, baseImage); err != nil {
		return err
	}
	return nil
}

func (s *session) stage(i image, dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	binary := filepath.Join(dir, i.binary)
	if err := copyFile(binary, s.binary(i.binary), 0o755); err != nil {
		return err
	}
	files, err := s.imageFiles(i)
	if err != nil {
		return err
	}
	for _, f := range files {
		to := filepath.Join(dir, "models", filepath.Base(filepath.Dir(f)), filepath.Base(f))
		if err := copyFile(to, f, 0o644); err != nil {
			return err
		}
	}
	return nil
}

func copyFile(to, from string, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}

// buildahEnv points buildah at a store below .lab.
func (s *session) buildahEnv() ([]string, error) {
	conf := filepath.Join(s.imageDir(), "storage.conf")
	store := filepath.Join(s.imageDir(), "store")
	text := fmt.Sprintf("[storage]\ndriver = \"overlay\"\ngraphroot = %q\nrunroot = %q\n", store+"/root", store+"/run")
	return []string{"CONTAINERS_STORAGE_CONF=" + conf, "BUILDAH_ISOLATION=chroot"}, os.WriteFile(conf, []byte(text), 0o644)
}

// cleanBuildah returns what removes the traces that buildah leaves outside its store, as far as they
// were not there before.
func cleanBuildah() func() {
	var fresh []string
	for _, p := range []string{"/etc/cni/net.d/cni.lock", "/etc/cni/net.d", "/etc/cni", "/var/lib/containers/cache", "/var/lib/containers", "/run/containers"} {
		if _, err := os.Stat(p); errors.Is(err, os.ErrNotExist) {
			fresh = append(fresh, p)
		}
	}
	return func() {
		for _, p := range fresh {
			if p == "/var/lib/containers/cache" {
				_ = os.RemoveAll(p)
				continue
			}
			_ = os.Remove(p) // only a file or an empty folder
		}
	}
}

// importStep hands the images to the node. Each has two names: "dev", and one by content, which the
// chart uses, so that a new build is a new revision.
func (s *session) importStep() step {
	return step{name: "import the images into the node", run: func() (string, error) {
		var imported []string
		for _, i := range s.images {
			marker := s.labFile("node/imported-" + i.name)
			if old, _ := os.ReadFile(marker); string(old) == i.tag {
				continue
			}
			s.ui.say("%s", i.name)
			if err := s.exec(s.command(s.tool("kubelab"), "images", "import", i.archive(s))); err != nil {
				return "", err
			}
			if err := s.exec(s.command(s.tool("kubelab"), "images", "tag", i.ref("dev"), i.ref(i.tag))); err != nil {
				return "", err
			}
			if err := os.WriteFile(marker, []byte(i.tag), 0o644); err != nil {
				return "", err
			}
			imported = append(imported, i.ref(i.tag))
		}
		if len(imported) == 0 {
			return "unchanged", nil
		}
		return strings.Join(imported, ", "), nil
	}}
}
