package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/urfave/cli/v2"

	"inkan/approver"
	approverclient "inkan/approver/client"
	"inkan/attest"
	"inkan/internal/durable"
	"inkan/internal/keyuri"
	"inkan/internal/strictjson"
	"inkan/signer"
	"inkan/tpm"
	"inkan/verify"
)

// Names of files in an approver's directory.
const (
	approverConfig = "approver.yaml"
	approverPublic = "approver.pub.pem"
)

func approverCommand(e *env) *cli.Command {
	config := func(more ...cli.Flag) []cli.Flag {
		return append([]cli.Flag{&cli.StringFlag{Name: "config", Value: "/var/lib/inkan-approver/" + approverConfig, Usage: "configuration `FILE`"}}, more...)
	}
	str := func(name, value, usage string) cli.Flag {
		return &cli.StringFlag{Name: name, Value: value, Usage: usage}
	}
	return &cli.Command{
		Name:  "approver",
		Usage: "check actions a second time, elsewhere; TPMs of agents in approver mode sign nothing without it",
		Subcommands: []*cli.Command{
			{Name: "init", Usage: "make an approver: its key, its TLS certificate, its configuration", Flags: []cli.Flag{
				str("dir", "/var/lib/inkan-approver", "the approver's `DIRECTORY`"), str("trust-domain", "", "`NAME` of the trust domain"), str("ca", "", "PEM `FILE` with the issuer's CA certificate"),
				str("crl-url", "", "`URL` of the issuer's revocation list"), str("listen", "127.0.0.1:8460", "`ADDRESS` for signers"), str("key", "", "key `URI` of a P-256 key, if not a new file"),
				str("record", "record.db", "`FILE` of its own record, or URL of a PostgreSQL database for one that several approvers share: postgres://user@host/database"),
				str("record-password-file", "", "`FILE` with the password of the database's user"),
				&cli.StringSliceFlag{Name: "server-name", Usage: "DNS `NAME` or address in the TLS certificate; localhost and 127.0.0.1 by default"},
				&cli.StringSliceFlag{Name: "agent", Usage: "`NAME` of an agent that it answers"}, jsonFlag(),
			}, Action: func(c *cli.Context) error { return approverInit(e, c) }},
			{Name: "serve", Usage: "serve signers", Flags: config(), Action: func(c *cli.Context) error { return approverServe(e, c) }},
			{Name: "check", Usage: "check a configuration file", Flags: config(jsonFlag()), Action: func(c *cli.Context) error {
				if _, err := readApproverConfig(c); err != nil {
					return err
				}
				return e.valid(c)
			}},
		},
	}
}

func approverInit(e *env, c *cli.Context) error {
	var domain, ca, crl string
	for name, to := range map[string]*string{"trust-domain": &domain, "ca": &ca, "crl-url": &crl} {
		var err error
		if *to, err = required(c, name); err != nil {
			return err
		}
	}
	if len(c.StringSlice("agent")) == 0 {
		return usage("--agent is missing: an approver answers the agents that it knows")
	}
	dir, err := filepath.Abs(c.String("dir"))
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, approverConfig)); err == nil {
		return fmt.Errorf("%s has an approver already", dir)
	}
	if ca, err = filepath.Abs(ca); err != nil {
		return err
	}
	if _, err := readPool(ca); err != nil {
		return err
	}
	uri, err := keyuri.Absolute(c.String("key"))
	if err != nil {
		return err
	}
	made := filepath.Join(dir, "approver.key")
	if uri == "" {
		uri = "file:" + made
	}
	config := approver.Config{Listen: c.String("listen"), TrustDomain: domain, Key: uri, Certificate: "tls.pem", CertificateKey: "tls.key", CA: ca, CRL: crl, Record: c.String("record")}
	if f := c.String("record-password-file"); f != "" {
		if config.PasswordFile, err = filepath.Abs(f); err != nil {
			return err
		}
	}
	for _, a := range c.StringSlice("agent") {
		config.Agents = append(config.Agents, approver.AgentConfig{Name: a})
	}
	yaml, err := strictjson.ToYAML(config)
	if err != nil {
		return err
	}
	if _, err := approver.ParseConfig(yaml, dir); err != nil { // before anything is written
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if c.String("key") == "" {
		if _, err = newKey(made); err != nil {
			return err
		}
	}
	key, closer, err := keyuri.Open(uri)
	if err != nil {
		return err
	}
	defer closer.Close()
	pub, ok := key.Public().(*ecdsa.PublicKey)
	if !ok {
		return errors.New("approver key: a P-256 key is expected")
	}
	id, err := attest.ApproverID(pub)
	if err != nil {
		return fmt.Errorf("approver key: %w", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return err
	}
	names := c.StringSlice("server-name")
	if len(names) == 0 {
		names = []string{"localhost", "127.0.0.1"}
	}
	certificate, err := serverCertificate(filepath.Join(dir, "tls.key"), names)
	if err != nil {
		return err
	}
	for file, b := range map[string][]byte{"tls.pem": certificate, approverPublic: pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}), approverConfig: yaml} {
		if err := durable.WriteFile(filepath.Join(dir, file), b, 0o644); err != nil {
			return err
		}
	}
	return e.show(c, map[string]string{"dir": dir, "approver": id, "public_key": filepath.Join(dir, approverPublic), "certificate": filepath.Join(dir, "tls.pem")}, func() {
		e.printf("The approver is in %s.\nThe policy key's holder approves it with --approver %s.\nSigners name it in approvers, with ca: %s.\n", dir, filepath.Join(dir, approverPublic), filepath.Join(dir, "tls.pem"))
	})
}

// serverCertificate makes a TLS key and a self-signed certificate, which
// signers pin. Who takes the approver's place on the network learns what is asked, and
// can give no authorization: that takes the approver's key.
func serverCertificate(keyFile string, names []string) ([]byte, error) {
	uri, err := newKey(keyFile)
	if err != nil {
		return nil, err
	}
	key, closer, err := keyuri.Open(uri)
	if err != nil {
		return nil, err
	}
	defer closer.Close()
	serial := make([]byte, 16)
	if _, err := rand.Read(serial); err != nil {
		return nil, err
	}
	serial[0] = serial[0]&0x7f | 0x40
	t := &x509.Certificate{SerialNumber: new(big.Int).SetBytes(serial), Subject: pkix.Name{CommonName: "Inkan approver"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(365 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, n)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

func readApproverConfig(c *cli.Context) (*approver.Config, error) {
	path, err := filepath.Abs(c.String("config"))
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return approver.ParseConfig(b, filepath.Dir(path))
}

func approverServe(e *env, c *cli.Context) (err error) {
	config, err := readApproverConfig(c)
	if err != nil {
		return err
	}
	roots, err := readPool(config.CA)
	if err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	key, closer, err := keyuri.Open(config.Key)
	if err != nil {
		return err
	}
	defer closer.Close()
	record, err := config.OpenRecord(c.Context)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, record.Close()) }()
	a, err := approver.New(config, key, roots, &verify.CRL{Load: verify.HTTPLoader(config.CRL), MaxAge: config.RevocationAge(), Reload: 5 * time.Second}, record, logger(e))
	if err != nil {
		return err
	}
	return a.Serve(interrupted(c), func(at approver.Addresses) {
		if err := e.printJSON(at); err != nil {
			fmt.Fprintf(e.stderr, "inkan: %v\n", err)
		}
		_, _ = daemon.SdNotify(false, daemon.SdNotifyReady) // without systemd there is nobody to tell
	})
}

// readPublicKey reads a P-256 public key in PEM.
func readPublicKey(path string) (*ecdsa.PublicKey, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "PUBLIC KEY" {
		return nil, fmt.Errorf("%s: a PUBLIC KEY in PEM is expected", path)
	}
	k, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	e, ok := k.(*ecdsa.PublicKey)
	if !ok || e.Curve != elliptic.P256() {
		return nil, fmt.Errorf("%s: a P-256 key is expected", path)
	}
	return e, nil
}

// approvers returns those that an agent's signer asks. It shows them the
// agent's TLS certificate, whose key is in the TPM too.
func (h *host) approvers(agent string, state *signer.State, policies *tpm.Policies) (*approverclient.Group, error) {
	if len(h.config.Approvers) == 0 {
		return nil, errors.New("its key is in approver mode, and the configuration names no approvers")
	}
	keys, err := state.Keys(attest.PurposeTLS)
	if err != nil {
		return nil, err
	}
	if keys[attest.PurposeTLS] == nil {
		return nil, errors.New("it has no TLS key, which approvers know it by: enrol it anew")
	}
	k, err := h.dev.LoadKey(keys[attest.PurposeTLS], policies)
	if err != nil {
		return nil, err
	}
	h.tls[agent] = k
	var members []approverclient.Member
	for _, a := range h.config.Approvers {
		roots, err := readPool(a.CA)
		if err != nil {
			return nil, fmt.Errorf("approver %s: ca: %w", a.URL, err)
		}
		members = append(members, approverclient.Member{URL: a.URL, Roots: roots})
	}
	hedge, timeout := h.config.ApproverTimes()
	return approverclient.New(members, func() (*tls.Certificate, error) {
		chain, err := state.Chain(attest.PurposeTLS) // it may have been renewed
		if err != nil {
			return nil, err
		}
		c := &tls.Certificate{PrivateKey: k}
		for _, x := range chain {
			c.Certificate = append(c.Certificate, x.Raw)
		}
		return c, nil
	}, hedge, timeout), nil
}
