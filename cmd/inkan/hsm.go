package main

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"os"

	"github.com/urfave/cli/v2"

	"inkan/hsm"
)

func hsmFlag() cli.Flag {
	return &cli.StringFlag{Name: "token", Usage: "`URI` of the token: pkcs11:token=LABEL?module-path=/path/module.so&pin-source=file:/path/pin"}
}

func hsmCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "hsm",
		Usage: "look at keys in a PKCS#11 token, and make them",
		Subcommands: []*cli.Command{
			{
				Name: "keygen", Usage: "make a key that cannot leave the token; prints its URI",
				Flags: []cli.Flag{hsmFlag(),
					&cli.StringFlag{Name: "algorithm", Value: string(hsm.P256), Usage: "P-256, P-384, RSA-2048, RSA-3072, RSA-4096 or Ed25519: `NAME`"},
					&cli.StringFlag{Name: "label", Value: "inkan", Usage: "CKA_LABEL: `TEXT`"}, jsonFlag()},
				Action: func(c *cli.Context) error {
					return withToken(c, func(t *hsm.Token) error {
						k, err := t.GenerateKey(hsm.Algorithm(c.String("algorithm")), c.String("label"), nil)
						if err != nil {
							return err
						}
						return e.show(c, map[string]string{"uri": k.URI()}, func() { e.printf("%s\n", k.URI()) })
					})
				},
			},
			{
				Name: "list", Usage: "list the token's private keys, and why a key would be refused",
				Flags:  []cli.Flag{hsmFlag(), jsonFlag()},
				Action: func(c *cli.Context) error { return withToken(c, func(t *hsm.Token) error { return hsmList(e, c, t) }) },
			},
			{
				Name: "check", Usage: "open one key as the signer does: its attributes, and a test signature",
				Flags: []cli.Flag{hsmFlag(), jsonFlag()},
				Action: func(c *cli.Context) error {
					u, err := hsm.ParseURI(c.String("token"))
					if err != nil {
						return withCode(exitUsage, err)
					}
					if len(u.ID) == 0 {
						return usage("--token: the URI names no key: id= is missing")
					}
					return withToken(c, func(t *hsm.Token) error {
						k, err := t.Key(u.ID)
						if err != nil {
							if _, ok := errors.AsType[*hsm.AttributeError](err); ok {
								return withCode(exitUnproven, err)
							}
							return err
						}
						s := t.Stats()
						spki, err := x509.MarshalPKIXPublicKey(k.Public())
						if err != nil {
							return err
						}
						pin := fmt.Sprintf("%x", sha256.Sum256(spki))
						return e.show(c, map[string]any{"key": k.Attributes(), "spki_sha256": pin, "signature_microseconds": s.Latency.Microseconds(), "sessions": s.Sessions}, func() {
							e.printf("key %x is good; one signature took %v; the token gave %d sessions\nSHA-256 of its SPKI: %s\n", u.ID, s.Latency, s.Sessions, pin)
						})
					})
				},
			},
		},
	}
}

// hsmWorkerCommand is what package hsm starts: nobody calls it by hand.
func hsmWorkerCommand() *cli.Command {
	return &cli.Command{
		Name: "hsm-worker", Hidden: true, Usage: "serve a PKCS#11 module to the process that started this one",
		Action: func(*cli.Context) error { return hsm.RunWorker(os.NewFile(3, "parent")) },
	}
}

func withToken(c *cli.Context, do func(*hsm.Token) error) error {
	uri, err := required(c, "token")
	if err != nil {
		return err
	}
	t, err := hsm.Open(uri, hsm.Options{})
	if err != nil {
		return err
	}
	return errors.Join(do(t), t.Close())
}

func hsmList(e *env, c *cli.Context, t *hsm.Token) error {
	list, err := t.List()
	if err != nil {
		return err
	}
	type row struct {
		hsm.Attributes
		ID      string `json:"id"`
		Refused string `json:"refused,omitempty"`
	}
	rows := []row{}
	for _, a := range list {
		r := row{Attributes: a, ID: hex.EncodeToString(a.ID)}
		if err := a.Check(); err != nil {
			r.Refused = err.Error()
		}
		rows = append(rows, r)
	}
	return e.show(c, rows, func() {
		for _, r := range rows {
			state := "good"
			if r.Refused != "" {
				state = r.Refused
			}
			e.printf("%s  %s  %s\n", r.ID, r.Label, state)
		}
	})
}
