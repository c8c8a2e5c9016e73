package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/urfave/cli/v2"

	"inkan/attest"
	"inkan/internal/durable"
	"inkan/internal/keyuri"
	"inkan/internal/strictjson"
	"inkan/issuer"
	"inkan/scope"
)

func dirFlag() cli.Flag {
	return &cli.StringFlag{Name: "dir", Value: "/var/lib/inkan-issuer", Usage: "the issuer's `DIRECTORY`"}
}

// adminFlags say how to reach an issuer: by its directory, or from elsewhere.
func adminFlags(more ...cli.Flag) []cli.Flag {
	return append([]cli.Flag{
		dirFlag(), jsonFlag(),
		&cli.StringFlag{Name: "admin-url", Usage: "`URL` of the administrators' API, if not the one of --dir"},
	}, more...)
}

func issuerCommand(e *env) *cli.Command {
	str := func(name, usage string) cli.Flag { return &cli.StringFlag{Name: name, Usage: usage} }
	sub := func(name, usage string, action func(*env, *cli.Context) error, flags ...cli.Flag) *cli.Command {
		return &cli.Command{Name: name, Usage: usage, Flags: flags, Action: func(c *cli.Context) error { return action(e, c) }}
	}
	return &cli.Command{
		Name:  "issuer",
		Usage: "certify agents' keys after attestation, and revoke them",
		Subcommands: []*cli.Command{
			sub("init", "make a CA, a policy key and an administrator's certificate", issuerInit, dirFlag(), jsonFlag(),
				str("trust-domain", "`NAME` of the trust domain, such as example.org"),
				&cli.StringFlag{Name: "name", Value: "Inkan CA", Usage: "`NAME` of the CA"},
				str("ca-key", "key `URI`; by default a key in a file of --dir"),
				str("policy-key", "key `URI`; by default a key in a file of --dir"),
				&cli.StringFlag{Name: "agent-listen", Value: "127.0.0.1:8443", Usage: "`ADDRESS` for hosts"},
				&cli.StringFlag{Name: "admin-listen", Value: "127.0.0.1:8444", Usage: "`ADDRESS` for administrators"},
				&cli.StringFlag{Name: "public-listen", Value: "127.0.0.1:8090", Usage: "`ADDRESS` for CRL and OCSP"},
				&cli.StringFlag{Name: "public-url", Usage: "`URL` of CRL and OCSP in certificates; by default that of --public-listen"},
				&cli.StringSliceFlag{Name: "server-name", Usage: "DNS `NAME` or address in the servers' certificate; localhost and 127.0.0.1 by default"},
				str("regions", "geofeed (.csv) or MMDB (.mmdb) `FILE` that says where addresses are, for scopes with source_regions"),
				&cli.StringFlag{Name: "lifetime", Value: "24h", Usage: "`DURATION` of agents' certificates"}),
			sub("admin", "certify an administrator's key for a year, with the CA's key", issuerAdmin, dirFlag(), jsonFlag(),
				&cli.StringFlag{Name: "name", Value: "administrator", Usage: "`NAME` in the certificate"},
				str("public-key", "PEM `FILE` with the P-256 public key of another administrator, in place of admin.key of --dir"), str("out", "write the certificate to `FILE`; by default admin.pem of --dir")),
			sub("serve", "serve hosts, administrators and receivers", issuerServe, dirFlag()),
			{Name: "device", Usage: "the TPMs in the inventory", Subcommands: []*cli.Command{
				sub("add", "add a TPM", deviceAdd, adminFlags(str("id", "`NAME` of the device"), str("ek-certificate", "PEM `FILE` of the EK certificate"),
					&cli.StringSliceFlag{Name: "ek-root", Usage: "PEM `FILE` with roots of the TPM's vendor"}, &cli.StringSliceFlag{Name: "ek-intermediate", Usage: "PEM `FILE` with CAs below the roots"},
					&cli.StringSliceFlag{Name: "ek-crl", Usage: "`FILE` with a revocation list of the vendor, PEM or DER; then a current one is demanded"},
					str("ek-pin", "SHA-256 of the EK's SPKI in `HEX`, for a TPM without a certificate"), str("without-tpm", "the host has no TPM, nothing is proven of it, and only the key with this SHA-256 of its SPKI, in an HSM, may be certified: `HEX`, from inkan hsm check"), &cli.BoolFlag{Name: "allow-expired", Usage: "accept an expired EK certificate"},
					&cli.BoolFlag{Name: "unsafe-clock", Usage: "accept a TPM clock that lost power without a shutdown"}, &cli.Int64Flag{Name: "min-firmware", Usage: "lowest firmware `VERSION`"})...),
				sub("list", "list the devices", deviceList, adminFlags()...),
				sub("epoch", "demand that a device's epoch counter be at least a number, which ends older approvals", deviceEpoch, adminFlags(str("id", "`NAME` of the device"),
					&cli.Uint64Flag{Name: "at-least", Usage: "`NUMBER`; the host increments its counter at its next enrolment or renewal"})...),
				sub("reset-audit", "forget what a device's TPM testified of its signatures: the next testimony is held against nothing", func(_ *env, c *cli.Context) error {
					return withClient(c, "id", func(cl *issuer.Client, id string) error { return cl.ResetAudit(c.Context, id) })
				}, adminFlags(str("id", "`NAME` of the device"))...),
				sub("remove", "remove a device whose agents are retired", func(_ *env, c *cli.Context) error {
					return withClient(c, "id", func(cl *issuer.Client, id string) error { return cl.RemoveDevice(c.Context, id) })
				}, adminFlags(str("id", "`NAME` of the device"))...),
			}},
			{Name: "agent", Usage: "the agents in the inventory", Subcommands: []*cli.Command{
				sub("add", "add an agent with its scope", agentAdd, adminFlags(str("name", "`NAME` of the agent"), str("device", "`NAME` of the device that it runs on"),
					str("scope", "YAML or JSON `FILE`"), &cli.BoolFlag{Name: "tls", Usage: "certify a TLS key too, in the TPM"}, &cli.BoolFlag{Name: "tls-hsm", Usage: "certify a TLS key too, in an HSM of the host"}, &cli.BoolFlag{Name: "hsm", Usage: "the action key is in an HSM of the host"},
					str("hsm-vendor", "with --hsm: the HSM's maker must vouch for the key, in this `FORMAT`: yubihsm2 or pkix"), str("hsm-root", "PEM `FILE` with the roots of the maker's evidence"),
					&cli.BoolFlag{Name: "approver", Usage: "the action key is in approver mode: the TPM demands an approver's authorization of each signature"},
					&cli.BoolFlag{Name: "cancel-without-approver", Usage: "with --approver: certify another key, in local mode, for cancels alone"},
					str("reserve", "with --approver: certify another key for this scope, which signs while no approver answers if one has consented not long before: YAML or JSON `FILE`"))...),
				sub("list", "list the agents", agentList, adminFlags()...),
				agentStatus("suspend", "revoke an agent's certificates until it is resumed", issuer.Suspended),
				agentStatus("resume", "let a suspended agent renew again", issuer.Active),
				agentStatus("retire", "revoke an agent's certificates for good", issuer.Retired),
			}},
			{Name: "policy", Usage: "the approved states of hosts", Subcommands: []*cli.Command{
				sub("approve", "approve PCR values with the policy key, here, and send the approval", policyApprove, adminFlags(str("name", "`NAME` of the policy"),
					str("pcrs", "JSON `FILE` from inkan tpm pcrs --json"), &cli.StringFlag{Name: "device", Value: "*", Usage: "`NAME` of the device; * is for all"}, str("policy-key", "key `URI`, if not the one of --dir"),
					&cli.Uint64Flag{Name: "epoch", Usage: "the approval ends when the device's epoch counter is above `NUMBER`; for one device"},
					&cli.StringSliceFlag{Name: "approver", Usage: "PEM `FILE` with an approver's public key: the approval is for keys in approver mode; given more than once, all must authorize"},
					&cli.BoolFlag{Name: "reserve", Usage: "the approval is for keys in reserve mode, which need a consent of the approver; of several, each gets one, NAME.1 and so on"},
					&cli.IntFlag{Name: "of", Usage: "`NUMBER` of the approvers that must authorize, in place of all: an approval is made for each group of so many, NAME.1 and so on"})...),
				sub("list", "list the approved policies", policyList, adminFlags()...),
				sub("retire", "take a policy out of force for enrolments and renewals", func(_ *env, c *cli.Context) error {
					return withClient(c, "name", func(cl *issuer.Client, n string) error { return cl.RetirePolicy(c.Context, n) })
				}, adminFlags(str("name", "`NAME` of the policy"))...),
			}},
			issuerKillCommand(e),
			{Name: "certificate", Usage: "the certificates that were issued", Subcommands: []*cli.Command{
				sub("list", "list certificates, the newest first", certificateList, adminFlags(str("agent", "of the agent with this `NAME` alone"))...),
				sub("revoke", "revoke a certificate", func(_ *env, c *cli.Context) error {
					return withClient(c, "serial", func(cl *issuer.Client, s string) error { return cl.Revoke(c.Context, s, c.String("reason")) })
				}, adminFlags(str("serial", "serial number in `HEX`"), &cli.StringFlag{Name: "reason", Value: "unspecified", Usage: "`REASON` of RFC 5280, such as keyCompromise"})...),
			}},
			sub("events", "show the decision log", eventsList, adminFlags(&cli.Int64Flag{Name: "after", Usage: "only events with a higher `NUMBER`"})...),
		},
	}
}

func agentStatus(name, usage, status string) *cli.Command {
	return &cli.Command{Name: name, Usage: usage, Flags: adminFlags(&cli.StringFlag{Name: "name", Usage: "`NAME` of the agent"}), Action: func(c *cli.Context) error {
		return withClient(c, "name", func(cl *issuer.Client, n string) error { return cl.SetStatus(c.Context, n, status) })
	}}
}

// mustNotExist keeps a key from being overwritten.
func mustNotExist(path string) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s exists: a key is not overwritten", path)
	}
	return nil
}

// newKey makes a P-256 key in a file and returns its URI.
func newKey(path string) (string, error) {
	if err := mustNotExist(path); err != nil {
		return "", err
	}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", err
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return "", err
	}
	return "file:" + path, durable.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
}

func issuerInit(e *env, c *cli.Context) error {
	domain, err := required(c, "trust-domain")
	if err != nil {
		return err
	}
	dir, err := filepath.Abs(c.String("dir"))
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, issuer.ConfigFile)); err == nil {
		return fmt.Errorf("%s has an issuer already", dir)
	}
	uri := func(flag, file string) (string, error) {
		if v := c.String(flag); v != "" {
			return keyuri.Absolute(v)
		}
		return "file:" + filepath.Join(dir, file), nil
	}
	ca, err := uri("ca-key", issuer.CAKeyFile)
	if err != nil {
		return err
	}
	policy, err := uri("policy-key", issuer.PolicyKeyFile)
	if err != nil {
		return err
	}
	names := c.StringSlice("server-name")
	if len(names) == 0 {
		names = []string{"localhost", "127.0.0.1"}
	}
	public := c.String("public-url")
	if public == "" {
		public = "http://" + c.String("public-listen")
	}
	regions := c.String("regions")
	if regions != "" {
		if regions, err = filepath.Abs(regions); err != nil {
			return err
		}
	}
	yaml, err := strictjson.ToYAML(issuer.Config{Regions: regions, TrustDomain: domain, CAKey: ca, PolicyKey: policy, AgentListen: c.String("agent-listen"), AdminListen: c.String("admin-listen"),
		PublicListen: c.String("public-listen"), PublicURL: public, ServerNames: names, Lifetime: c.String("lifetime"), CRLLifetime: "1h"})
	if err != nil {
		return err
	}
	if _, err := issuer.ParseConfig(yaml); err != nil { // before anything is written
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	made := map[string]string{"ca-key": issuer.CAKeyFile, "policy-key": issuer.PolicyKeyFile, "": issuer.AdminKeyFile}
	for flag, file := range made {
		if flag != "" && c.String(flag) != "" {
			continue
		}
		if _, err := newKey(filepath.Join(dir, file)); err != nil {
			return err
		}
	}
	admin := "file:" + filepath.Join(dir, issuer.AdminKeyFile)
	var keys []crypto.Signer
	for _, u := range []string{ca, policy, admin} {
		k, closer, err := keyuri.Open(u)
		if err != nil {
			return err
		}
		defer closer.Close()
		keys = append(keys, k)
	}
	if err := issuer.Init(c.Context, dir, yaml, c.String("name"), keys[0], keys[1].Public(), keys[2].Public(), slog.New(slog.DiscardHandler)); err != nil {
		return err
	}
	return e.show(c, map[string]string{"dir": dir, "ca": filepath.Join(dir, issuer.CAFile)}, func() {
		e.printf("The issuer of %s is in %s.\nIts CA certificate, which receivers and auditors need, is %s.\n", domain, dir, filepath.Join(dir, issuer.CAFile))
	})
}

func readIssuerConfig(c *cli.Context) (*issuer.Config, error) {
	b, err := os.ReadFile(filepath.Join(c.String("dir"), issuer.ConfigFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s has no issuer: inkan issuer init makes one", c.String("dir"))
	}
	if err != nil {
		return nil, err
	}
	return issuer.ParseConfig(b)
}

func logger(e *env) *slog.Logger { return slog.New(slog.NewJSONHandler(e.stderr, nil)) }

func issuerServe(e *env, c *cli.Context) error {
	config, err := readIssuerConfig(c)
	if err != nil {
		return err
	}
	key, closer, err := keyuri.Open(config.CAKey)
	if err != nil {
		return err
	}
	defer closer.Close()
	i, err := issuer.New(c.Context, c.String("dir"), config, key, logger(e))
	if err != nil {
		return err
	}
	err = i.Serve(interrupted(c), func(a issuer.Addresses) {
		if err := e.printJSON(a); err != nil {
			fmt.Fprintf(e.stderr, "inkan: %v\n", err)
		}
		_, _ = daemon.SdNotify(false, daemon.SdNotifyReady) // without systemd there is nobody to tell
	})
	return errors.Join(err, i.Close())
}

// issuerAdmin renews the certificate of the administrator in --dir, or makes
// one for another. A server that runs takes it at once.
func issuerAdmin(e *env, c *cli.Context) error {
	config, err := readIssuerConfig(c)
	if err != nil {
		return err
	}
	out := c.String("out")
	var public crypto.PublicKey
	switch path := c.String("public-key"); {
	case path != "" && out == "":
		return usage("--out is missing: the certificate of another's key does not belong into --dir")
	case path != "":
		if public, err = readPublicKey(path); err != nil {
			return err
		}
	default:
		k, closer, err := keyuri.Open("file:" + filepath.Join(c.String("dir"), issuer.AdminKeyFile))
		if err != nil {
			return err
		}
		defer closer.Close()
		public = k.Public()
	}
	if out == "" {
		out = filepath.Join(c.String("dir"), issuer.AdminFile)
	}
	key, closer, err := keyuri.Open(config.CAKey)
	if err != nil {
		return err
	}
	defer closer.Close()
	i, err := issuer.New(c.Context, c.String("dir"), config, key, logger(e))
	if err != nil {
		return err
	}
	crt, err := i.CertifyAdministrator(c.Context, c.String("name"), public)
	if err = errors.Join(err, i.Close()); err != nil {
		return err
	}
	if err := durable.WriteFile(out, crt, 0o644); err != nil {
		return err
	}
	return e.show(c, map[string]string{"certificate": out}, func() { e.printf("%s\n", out) })
}

// adminNotice is how long before its end an administrator's certificate is
// complained of.
const adminNotice = 30 * 24 * time.Hour

// adminClient reaches the issuer with the administrator's certificate in --dir.
func adminClient(c *cli.Context) (*issuer.Client, error) {
	dir := c.String("dir")
	base := c.String("admin-url")
	if base == "" {
		config, err := readIssuerConfig(c)
		if err != nil {
			return nil, err
		}
		base = "https://" + config.AdminListen
	}
	ca, err := readCertificates(filepath.Join(dir, issuer.CAFile))
	if err != nil {
		return nil, err
	}
	admin, err := tls.LoadX509KeyPair(filepath.Join(dir, issuer.AdminFile), filepath.Join(dir, issuer.AdminKeyFile))
	if err != nil {
		return nil, fmt.Errorf("the administrator's certificate: %w", err)
	}
	if end := admin.Leaf.NotAfter; time.Now().After(end) {
		return nil, fmt.Errorf("the administrator's certificate ended at %s: inkan issuer admin, where the CA's key is, makes another", end.Format(time.RFC3339))
	} else if time.Until(end) < adminNotice {
		fmt.Fprintf(c.App.ErrWriter, "inkan: the administrator's certificate ends at %s: inkan issuer admin makes another\n", end.Format(time.RFC3339))
	}
	return issuer.NewClient(base, ca[0], admin), nil
}

func withClient(c *cli.Context, flag string, f func(*issuer.Client, string) error) error {
	v, err := required(c, flag)
	if err != nil {
		return err
	}
	cl, err := adminClient(c)
	if err != nil {
		return err
	}
	return f(cl, v)
}

func deviceAdd(e *env, c *cli.Context) error {
	return withClient(c, "id", func(cl *issuer.Client, id string) error {
		d := issuer.Device{ID: id, EK: c.String("ek-pin"), AllowExpired: c.Bool("allow-expired"), UnsafeClock: c.Bool("unsafe-clock"), MinFirmware: c.Int64("min-firmware")}
		cert := c.String("ek-certificate")
		if pin := c.String("without-tpm"); pin != "" {
			if d.EK != "" || cert != "" {
				return usage("--without-tpm stands with no EK")
			}
			d.EK, d.Unattested = pin, true
			if err := cl.AddDevice(c.Context, d); err != nil {
				return err
			}
			return e.show(c, d, func() { e.printf("device %s has no TPM; the key %s may be certified for it\n", d.ID, d.EK) })
		}
		switch {
		case (d.EK == "") == (cert == ""):
			return usage("give --ek-certificate with --ek-root, or --ek-pin")
		case cert != "" && len(c.StringSlice("ek-root")) == 0:
			return usage("--ek-root is missing: the EK certificate must chain to a root that you trust")
		case cert != "":
			list, err := readCertificates(cert)
			if err != nil {
				return err
			}
			d.EK = fmt.Sprintf("%x", attest.CertificateSPKIDigest(list[0]))
		}
		for _, f := range []struct {
			to    *string
			files []string
		}{{&d.Roots, c.StringSlice("ek-root")}, {&d.Intermediates, c.StringSlice("ek-intermediate")}} {
			for _, path := range f.files {
				b, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				*f.to += string(b) + "\n" // the file's last line may have no end
			}
		}
		for _, path := range c.StringSlice("ek-crl") {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if !strings.HasPrefix(string(b), "-----BEGIN") {
				b = pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: b})
			}
			d.CRLs += string(b) + "\n"
		}
		if err := cl.AddDevice(c.Context, d); err != nil {
			return err
		}
		return e.show(c, d, func() { e.printf("device %s has the EK %s\n", d.ID, d.EK) })
	})
}

func deviceEpoch(_ *env, c *cli.Context) error {
	return withClient(c, "id", func(cl *issuer.Client, id string) error {
		n := c.Uint64("at-least")
		if n == 0 {
			return usage("--at-least is missing: inkan tpm epoch shows the counter, on the host")
		}
		return cl.SetEpoch(c.Context, id, n)
	})
}

// table prints rows for a person.
func (e *env) table(header string, rows func(w *tabwriter.Writer)) {
	w := tabwriter.NewWriter(e.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, header)
	rows(w)
	_ = w.Flush() // standard output may be closed
}

func deviceList(e *env, c *cli.Context) error {
	cl, err := adminClient(c)
	if err != nil {
		return err
	}
	list, err := cl.Devices(c.Context)
	if err != nil {
		return err
	}
	return e.show(c, list, func() {
		e.table("DEVICE\tEK\tTRUST\tENROLLED\tEPOCH", func(w *tabwriter.Writer) {
			for _, d := range list {
				trust := "certificate"
				if d.Roots == "" {
					trust = "pinned"
				}
				epoch := "-"
				if d.EpochMin > 0 {
					epoch = fmt.Sprintf("%d (at least %d)", d.Epoch, d.EpochMin)
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%v\t%s\n", d.ID, d.EK, trust, d.Enrolled, epoch)
			}
		})
	})
}

func agentAdd(e *env, c *cli.Context) error {
	return withClient(c, "name", func(cl *issuer.Client, name string) error {
		device, err := required(c, "device")
		if err != nil {
			return err
		}
		s, err := e.readScope(c)
		if err != nil {
			return err
		}
		a := issuer.Agent{Name: name, Device: device, Scope: string(s.Canonical()), TLS: c.Bool("tls"), TLSHSM: c.Bool("tls-hsm"), HSM: c.Bool("hsm"), Approver: c.Bool("approver"), Cancels: c.Bool("cancel-without-approver"), Vendor: c.String("hsm-vendor")}
		var reserve *scope.Scope
		if path := c.String("reserve"); path != "" {
			if reserve, err = e.readScopeFile(path); err != nil {
				return err
			}
			a.Reserve = string(reserve.Canonical())
		}
		if path := c.String("hsm-root"); path != "" {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			a.VendorRoots = string(b)
		}
		if err := cl.AddAgent(c.Context, a); err != nil {
			return err
		}
		return e.show(c, a, func() {
			e.printf("%s\n", name)
			for _, line := range s.Describe() {
				e.printf("  %s\n", line)
			}
			if reserve != nil {
				e.printf("reserve, while no approver answers\n")
				for _, line := range reserve.Describe() {
					e.printf("  %s\n", line)
				}
			}
		})
	})
}

func agentList(e *env, c *cli.Context) error {
	cl, err := adminClient(c)
	if err != nil {
		return err
	}
	list, err := cl.Agents(c.Context)
	if err != nil {
		return err
	}
	return e.show(c, list, func() {
		e.table("AGENT\tDEVICE\tSTATUS\tTLS", func(w *tabwriter.Writer) {
			for _, a := range list {
				fmt.Fprintf(w, "%s\t%s\t%s\t%v\n", a.Name, a.Device, a.Status, a.TLS)
			}
		})
	})
}

func policyApprove(e *env, c *cli.Context) error {
	return withClient(c, "name", func(cl *issuer.Client, name string) error {
		path, err := required(c, "pcrs")
		if err != nil {
			return err
		}
		b, err := e.readInput(path, 64<<10)
		if err != nil {
			return err
		}
		var values []attest.PCRValue
		if err := strictjson.Unmarshal(b, 64<<10, &values); err != nil {
			return fmt.Errorf("%s: what inkan tpm pcrs --json prints is expected: %w", path, err)
		}
		config, err := readIssuerConfig(c)
		if err != nil {
			return err
		}
		uri := c.String("policy-key")
		if uri == "" {
			uri = config.PolicyKey
		}
		key, closer, err := keyuri.Open(uri)
		if err != nil {
			return err
		}
		defer closer.Close()
		var approvers []*ecdsa.PublicKey
		for _, path := range c.StringSlice("approver") {
			k, err := readPublicKey(path)
			if err != nil {
				return err
			}
			approvers = append(approvers, k)
		}
		if c.Uint64("epoch") > 0 && c.String("device") == "*" {
			return usage("--epoch needs --device: each TPM counts by itself")
		}
		if c.IsSet("of") && c.Int("of") < 1 {
			return usage("--of %d: at least 1 is expected", c.Int("of"))
		}
		reserve := c.Bool("reserve")
		if reserve && (len(approvers) == 0 || c.IsSet("of")) {
			return usage("--reserve needs --approver, and not --of: the consent of one is enough")
		}
		of := c.Int("of")
		if reserve {
			of = 1
		}
		names, groups, err := quorums(name, approvers, of)
		if err != nil {
			return err
		}
		var approved []*attest.ApprovedPolicy
		for i, group := range groups {
			var p *attest.ApprovedPolicy
			if ref := attest.PolicyRef(config.TrustDomain); reserve {
				p, err = attest.SignReservePolicy(key, names[i], values, ref, c.Uint64("epoch"), group[0])
			} else {
				p, err = attest.SignEpochPolicy(key, names[i], values, ref, c.Uint64("epoch"), group...)
			}
			if err != nil {
				return err
			}
			approved = append(approved, p)
		}
		for _, p := range approved {
			if err := cl.AddPolicy(c.Context, issuer.Policy{Device: c.String("device"), Approved: *p}); err != nil {
				return fmt.Errorf("policy %s: %w", p.Name, err)
			}
		}
		var result any = approved
		if len(approved) == 1 {
			result = approved[0]
		}
		return e.show(c, result, func() {
			for _, n := range names {
				e.printf("policy %s approves %d PCRs for device %s\n", n, len(values), c.String("device"))
			}
			if m := c.Int("of"); m > 0 && 2*m <= len(approvers) {
				e.printf("Two groups of %d have no approver in common: let all %d share one record, or each group can be asked for the same allowance.\n", m, len(approvers))
			}
		})
	})
}

func policyList(e *env, c *cli.Context) error {
	cl, err := adminClient(c)
	if err != nil {
		return err
	}
	list, err := cl.Policies(c.Context)
	if err != nil {
		return err
	}
	return e.show(c, list, func() {
		e.table("POLICY\tDEVICE\tPCRS\tMODE\tEPOCH\tRETIRED", func(w *tabwriter.Writer) {
			for _, p := range list {
				epoch := "-"
				if p.Approved.Epoch > 0 {
					epoch = fmt.Sprint(p.Approved.Epoch)
				}
				fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\t%v\n", p.Approved.Name, p.Device, len(p.Approved.PCRs), p.Approved.Mode(), epoch, p.Retired)
			}
		})
	})
}

func certificateList(e *env, c *cli.Context) error {
	cl, err := adminClient(c)
	if err != nil {
		return err
	}
	list, err := cl.Certificates(c.Context, c.String("agent"))
	if err != nil {
		return err
	}
	return e.show(c, list, func() {
		e.table("SERIAL\tPROFILE\tAGENT\tNOT AFTER\tREVOKED", func(w *tabwriter.Writer) {
			for _, x := range list {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", x.Serial, x.Profile, x.Agent, x.NotAfter.Format(time.RFC3339), x.Reason)
			}
		})
	})
}

// allEvents reads the decision log page by page.
func allEvents(ctx context.Context, cl *issuer.Client, after int64) ([]issuer.Event, error) {
	list := []issuer.Event{}
	for {
		page, err := cl.Events(ctx, after)
		if err != nil || len(page) == 0 {
			return list, err
		}
		list, after = append(list, page...), page[len(page)-1].ID
	}
}

// oneLine shows characters that are not printed by their number. Hosts choose
// names and more that stand in the decision log.
func oneLine(s string) string {
	var b strings.Builder
	for _, r := range s {
		if strconv.IsPrint(r) {
			b.WriteRune(r)
		} else {
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		}
	}
	return b.String()
}

func eventsList(e *env, c *cli.Context) error {
	cl, err := adminClient(c)
	if err != nil {
		return err
	}
	list, err := allEvents(c.Context, cl, c.Int64("after"))
	if err != nil {
		return err
	}
	return e.show(c, list, func() {
		e.table("NUMBER\tTIME\tKIND\tAGENT\tDEVICE\tCHECK\tDETAIL", func(w *tabwriter.Writer) {
			for _, x := range list {
				fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\n", x.ID, x.Time.Format(time.RFC3339), x.Kind, oneLine(x.Agent), x.Device, x.Check, oneLine(x.Detail))
			}
		})
	})
}

// readScope reads the file of --scope, in YAML or JSON.
func (e *env) readScope(c *cli.Context) (*scope.Scope, error) {
	path, err := required(c, "scope")
	if err != nil {
		return nil, err
	}
	return e.readScopeFile(path)
}

func (e *env) readScopeFile(path string) (*scope.Scope, error) {
	b, err := e.readInput(path, scope.MaxScope)
	if err != nil {
		return nil, err
	}
	s, err := scope.ParseYAML(b) // JSON is YAML
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}
