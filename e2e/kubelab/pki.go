package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"time"
)

// The lab's certificates: a CA for servers and clients, and a second one for the aggregation layer,
// which must differ. Every "up" makes new ones.

type pair struct {
	cert         *x509.Certificate
	key          crypto.Signer
	certPEM, pem []byte // certificate and private key as they are written
}

// subject is what a certificate is for.
type subject struct {
	name string // of its files
	user string
	orgs []string
}

// users are the clients of the API server; each gets a kubeconfig.
func users(nodeName string) []subject {
	return []subject{
		{"admin", "admin", []string{"system:masters"}},
		{"controller-manager", "system:kube-controller-manager", nil},
		{"scheduler", "system:kube-scheduler", nil},
		{"kube-proxy", "system:kube-proxy", nil},
		{"coredns", "system:coredns", nil},
		{"kubelet", "system:node:" + nodeName, []string{"system:nodes"}},
	}
}

// issue makes a certificate signed by ca; ca == nil makes a self-signed CA.
func issue(ca *pair, who subject, ips []net.IP, dns []string) (*pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: who.user, Organization: who.orgs},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment, IPAddresses: ips, DNSNames: dns,
	}
	parent, signer := t, crypto.Signer(key)
	if ca == nil {
		t.IsCA, t.BasicConstraintsValid, t.KeyUsage = true, true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
	} else {
		parent, signer = ca.cert, ca.key
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key.Public(), signer)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &pair{cert, key, encodePEM("CERTIFICATE", der), encodePEM("PRIVATE KEY", keyDER)}, nil
}

func encodePEM(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// writePKI writes all keys, certificates and kubeconfigs.
func (l *lab) writePKI(nodeName string) error {
	if err := os.MkdirAll(l.path("pki"), 0o700); err != nil {
		return err
	}
	ca, err := issue(nil, subject{user: "kubelab-ca"}, nil, nil)
	if err != nil {
		return err
	}
	front, err := issue(nil, subject{user: "kubelab-front-proxy-ca"}, nil, nil)
	if err != nil {
		return err
	}
	frontClient, err := issue(front, subject{user: "front-proxy-client"}, nil, nil)
	if err != nil {
		return err
	}
	server, err := issue(ca, subject{user: "kube-apiserver"},
		[]net.IP{net.ParseIP("127.0.0.1"), net.ParseIP(apiServiceIP), net.ParseIP(l.host)},
		[]string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"})
	if err != nil {
		return err
	}
	for name, p := range map[string]*pair{"ca": ca, "front-ca": front, "front-client": frontClient, "apiserver": server} {
		if err := l.writePair(name, p); err != nil {
			return err
		}
	}
	if err := l.writeTokenKey(); err != nil {
		return err
	}
	for _, u := range users(nodeName) {
		p, err := issue(ca, u, nil, nil)
		if err != nil {
			return err
		}
		if err := l.writePair(u.name, p); err != nil {
			return err
		}
		to := l.pki(u.name + ".kubeconfig")
		if u.name == "admin" {
			to = l.path("admin.kubeconfig")
		}
		if err := writeFile(to, kubeconfig(u.name, l.url(), ca, p)); err != nil {
			return err
		}
	}
	return nil
}

func (l *lab) writePair(name string, p *pair) error {
	if err := os.WriteFile(l.pki(name+".crt"), p.certPEM, 0o600); err != nil {
		return err
	}
	return os.WriteFile(l.pki(name+".key"), p.pem, 0o600)
}

// writeTokenKey makes the key that signs service account tokens.
func (l *lab) writeTokenKey() error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return err
	}
	if err := os.WriteFile(l.pki("sa.key"), encodePEM("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(key)), 0o600); err != nil {
		return err
	}
	return os.WriteFile(l.pki("sa.pub"), encodePEM("PUBLIC KEY", public), 0o600)
}

func kubeconfig(user, url string, ca, client *pair) []byte {
	b64 := base64.StdEncoding.EncodeToString
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
current-context: kubelab
clusters:
- name: kubelab
  cluster: {server: %q, certificate-authority-data: %s}
users:
- name: %[3]s
  user: {client-certificate-data: %[4]s, client-key-data: %[5]s}
contexts:
- name: kubelab
  context: {cluster: kubelab, user: %[3]s}
`, url, b64(ca.certPEM), user, b64(client.certPEM), b64(client.pem))
}
