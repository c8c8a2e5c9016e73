package main

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"inkan/attest"
	"inkan/internal/durable"
	"inkan/internal/keyuri"
	"inkan/tpm"
)

func tpmFlag() cli.Flag {
	return &cli.StringFlag{Name: "tpm", Value: "/dev/tpmrm0", Usage: "`ADDRESS` of the TPM: a device, or the socket of a software TPM"}
}

func tpmCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "tpm",
		Usage: "look at a TPM, and make keys for a CA in it",
		Subcommands: []*cli.Command{
			{
				Name: "info", Usage: "show the TPM's endorsement keys, as the issuer's inventory names them",
				Flags:  []cli.Flag{tpmFlag(), &cli.StringFlag{Name: "ek-certificate-out", Usage: "write the first endorsement key's certificate to `FILE`, in PEM"}, jsonFlag()},
				Action: func(c *cli.Context) error { return tpmInfo(e, c) },
			},
			{
				Name: "pcrs", Usage: "print PCR values, in the form that inkan issuer policy approve takes",
				Flags:  []cli.Flag{tpmFlag(), &cli.StringFlag{Name: "pcr", Value: "sha256:0,2,4,7", Usage: "`BANK:INDEXES`"}, jsonFlag()},
				Action: func(c *cli.Context) error { return tpmPCRs(e, c) },
			},
			{
				Name: "epoch", Usage: "show the host's epoch counter; make it if there is none",
				Flags:  []cli.Flag{tpmFlag(), &cli.StringFlag{Name: "owner-auth-file", Usage: "`FILE` with the owner hierarchy's authorization"}, jsonFlag()},
				Action: func(c *cli.Context) error { return tpmEpoch(e, c) },
			},
			{
				Name: "keygen", Usage: "make a P-256 key for a CA or for approving policies; its URI is tpm:ADDRESS?key=FILE",
				Flags: []cli.Flag{tpmFlag(), &cli.StringFlag{Name: "out", Usage: "write the TSS2 PRIVATE KEY to `FILE`"}, jsonFlag()},
				Action: func(c *cli.Context) error {
					out, err := required(c, "out")
					if err != nil {
						return err
					}
					if err := mustNotExist(out); err != nil {
						return err
					}
					uri, err := keyuri.TPM(c.String("tpm"), out)
					if err != nil {
						return err
					}
					d, err := tpm.Open(c.String("tpm"))
					if err != nil {
						return err
					}
					defer d.Close()
					file, _, err := d.CreateKey(tpm.SigningTemplate())
					if err != nil {
						return err
					}
					if err := durable.WriteFile(out, file, 0o600); err != nil {
						return err
					}
					return e.show(c, map[string]string{"uri": uri}, func() { e.printf("%s\n", uri) })
				},
			},
		},
	}
}

func tpmEpoch(e *env, c *cli.Context) error {
	var o tpm.Options
	if path := c.String("owner-auth-file"); path != "" {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		o.OwnerAuth = []byte(strings.TrimRight(string(b), "\n"))
	}
	d, err := tpm.OpenWith(c.String("tpm"), o)
	if err != nil {
		return err
	}
	defer d.Close()
	n, err := d.Epoch(0)
	if err != nil {
		return err
	}
	return e.show(c, map[string]any{"epoch": n, "index": fmt.Sprintf("%#x", attest.EpochIndex), "name": fmt.Sprintf("%x", attest.EpochName())}, func() { e.printf("%d\n", n) })
}

func tpmInfo(e *env, c *cli.Context) error {
	d, err := tpm.Open(c.String("tpm"))
	if err != nil {
		return err
	}
	defer d.Close()
	eks, err := d.EKs()
	if err != nil {
		return err
	}
	type key struct {
		Algorithm   string `json:"algorithm"`
		SHA256      string `json:"spki_sha256"`
		Certificate bool   `json:"certificate"`
		Issuer      string `json:"issuer,omitempty"`
		Used        bool   `json:"used"` // by inkan signer enrol: the inventory must have this one
	}
	var keys []key
	for n, ek := range eks {
		digest, err := attest.SPKIDigest(ek.Public)
		if err != nil {
			return err
		}
		k := key{Algorithm: ek.Algorithm(), SHA256: fmt.Sprintf("%x", digest), Certificate: ek.Certificate != nil, Used: n == 0}
		if ek.Certificate != nil {
			crt, err := attest.CutCertificate(ek.Certificate)
			if err != nil {
				return err
			}
			k.Issuer = crt.Issuer.String()
			if out := c.String("ek-certificate-out"); out != "" && n == 0 {
				if err := durable.WriteFile(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: crt.Raw}), 0o644); err != nil {
					return err
				}
			}
		}
		keys = append(keys, k)
	}
	return e.show(c, map[string]any{"endorsement_keys": keys}, func() {
		for _, k := range keys {
			what := "no certificate: pin it with --ek-pin"
			if k.Certificate {
				what = "certificate by " + k.Issuer
			}
			if !k.Used {
				what = "not used: the first one is"
			}
			e.printf("EK %-9s SHA-256 %s  %s\n", k.Algorithm, k.SHA256, what)
		}
	})
}

func parsePCRs(s string) ([]attest.PCRSelection, error) {
	bank, list, ok := strings.Cut(s, ":")
	if !ok {
		return nil, usage("--pcr %s: sha256:0,2,4,7 is an example of what is expected", s)
	}
	sel := attest.PCRSelection{Bank: bank}
	for text := range strings.SplitSeq(list, ",") {
		n, err := strconv.Atoi(text)
		if err != nil {
			return nil, usage("--pcr %s: %q is not a number", s, text)
		}
		sel.Indexes = append(sel.Indexes, n)
	}
	out := []attest.PCRSelection{sel}
	_, err := attest.Selection(out)
	return out, withCode(exitUsage, err)
}

func tpmPCRs(e *env, c *cli.Context) error {
	sel, err := parsePCRs(c.String("pcr"))
	if err != nil {
		return err
	}
	d, err := tpm.Open(c.String("tpm"))
	if err != nil {
		return err
	}
	defer d.Close()
	values, err := d.ReadPCRs(sel)
	if err != nil {
		return err
	}
	return e.show(c, values, func() {
		for _, v := range values {
			e.printf("%s %2d  %x  %s\n", v.Bank, v.Index, v.Digest, attest.PCRName(v.Index))
		}
	})
}

// readCertificates reads a PEM file.
func readCertificates(path string) ([]*x509.Certificate, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	list, err := attest.ParseCertificates(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return list, nil
}

func readPool(path string) (*x509.CertPool, error) {
	list, err := readCertificates(path)
	if err != nil {
		return nil, err
	}
	p := x509.NewCertPool()
	for _, c := range list {
		p.AddCert(c)
	}
	return p, nil
}
