package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"inkan/attest"
	"inkan/internal/attester"
	"inkan/internal/problem"
	"inkan/journal"
	"inkan/signer"
	"inkan/signer/client"
	"inkan/simulator"
	"inkan/tpm"
)

// attacks carries out every attack, in an order in which none spoils another.
func (w *world) attacks(ctx context.Context) error {
	w.title("6. Attacks on what the agent may do")
	if err := w.attackScope(ctx); err != nil {
		return err
	}
	w.title("7. Attacks on the signed action, at the venue")
	if err := w.attackVenue(ctx); err != nil {
		return err
	}
	w.title("8. Attacks on the signer and its key")
	if err := w.attackHost(ctx); err != nil {
		return err
	}
	w.title("9. Attacks on the issuer, with a TPM of the attacker's choice")
	if err := w.attackIssuer(ctx); err != nil {
		return err
	}
	w.title("10. The host changes, and the certificate is revoked")
	return w.attackLast(ctx)
}

// signs tries to have an action signed.
func (w *world) signs(ctx context.Context, binary, action string) (accepted bool, said string, err error) {
	r, err := runCommand(ctx, action, binary, "sign", "--socket", w.socket(), "--action", "-")
	return r.code == 0, r.stderr, err
}

// signsByLog is signs where the device is to refuse: why it did not sign is in the signer's log alone.
func (w *world) signsByLog(ctx context.Context, action string) (accepted bool, said string, err error) {
	accepted, said, err = w.signs(ctx, w.inkan, action)
	if err != nil || accepted || !strings.Contains(said, string(signer.RuleDevice)) {
		return accepted, said, err
	}
	b, err := os.ReadFile(w.path("signer.log"))
	if err != nil {
		return false, "", err
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return false, lines[len(lines)-1], nil
}

func (w *world) attackScope(ctx context.Context) error {
	for _, a := range []struct {
		name, rule string
		changes    []string
	}{
		{"order above the limit", "max_order_notional", []string{`"400"`, `"5000"`}},
		{"order for another venue", "allowed_venues", []string{`"XPAR"`, `"XLON"`}},
		{"instrument not in scope", "allowed_instruments", []string{"FR0000120271", "FR0000131104"}},
		{"market order without a price", "notional_undefined", []string{`"OrdType":"2","Price":"61.24"`, `"OrdType":"1"`}},
		{"withdrawal of money", "allowed_actions", []string{"order.new", "payment.withdraw", order("")[strings.Index(order(""), `"ord":`):strings.Index(order(""), `,"pty"`)], `"pay":{"Amount":"1","Currency":"EUR","Destination":"me"}`}},
		{"number in another spelling", "form", []string{`"61.24"`, `"6.124e1"`}},
		{"member twice", "form", []string{`"Side":"1"`, `"Side":"1","Side":"2"`}},
	} {
		if err := w.attack(a.name, "signer", a.rule, func() (bool, string, error) {
			return w.signs(ctx, w.inkan, order(client.NewID(), a.changes...))
		}); err != nil {
			return err
		}
	}
	return nil
}

// verifies has the venue verify a JWS.
func (w *world) verifies(ctx context.Context, jws string, more ...string) (accepted bool, said string, err error) {
	if err := w.write("attack.jws", jws); err != nil {
		return false, "", err
	}
	r, err := w.try(ctx, "", w.verifyArgs("attack.jws", append(more, "--replay-db", w.path("venue.db"))...)...)
	return r.code == 0, r.stderr, err
}

func (w *world) attackVenue(ctx context.Context) error {
	signed, err := client.New(w.socket()).SignJSON(ctx, []byte(order(client.NewID())))
	if err == nil {
		return fmt.Errorf("the demo itself was taken for the agent: %s", signed.ID) // its executable is another one
	}
	fresh := func() (string, error) {
		r, err := w.try(ctx, order(client.NewID()), "sign", "--socket", w.socket(), "--action", "-")
		if err == nil && r.code != 0 {
			err = errors.New(r.stderr)
		}
		return strings.TrimSpace(r.stdout), err
	}
	used, err := os.ReadFile(w.path("order.jws"))
	if err != nil {
		return err
	}
	tampered := func(jws string) string { // one more share in the payload
		p := strings.Split(jws, ".")
		b := decode(p[1])
		p[1] = encode([]byte(strings.Replace(string(b), `"OrderQty":"400"`, `"OrderQty":"401"`, 1)))
		return strings.Join(p, ".")
	}
	for _, a := range []struct {
		name, reason string
		jws          func(string) string
		args         []string
	}{
		{"tampered order", "signature", tampered, nil},
		{"replayed order", "replay", func(string) string { return strings.TrimSpace(string(used)) }, nil},
		{"order for another audience", "audience", nil, []string{"--audience", "XLON"}},
		{"signature with alg none", "header", func(j string) string {
			return encode([]byte(`{"alg":"none","typ":"agent-action+jws","x5t#S256":"x"}`)) + j[strings.Index(j, "."):]
		}, nil},
		{"order kept for an hour", "expired", nil, []string{"--max-revocation-age", "2h", "--at", time.Now().Add(50 * time.Minute).UTC().Format(time.RFC3339)}},
		{"stolen order sent from another address", "source_network", nil, []string{"--source-address", "203.0.113.9"}},
		{"expired certificate", "certificate_expired", nil, []string{"--at", time.Now().Add(25 * time.Hour).UTC().Format(time.RFC3339)}},
	} {
		if err := w.attack(a.name, "venue", a.reason, func() (bool, string, error) {
			jws, err := fresh()
			if err != nil {
				return false, "", err
			}
			if a.jws != nil {
				jws = a.jws(jws)
			}
			if a.reason == "audience" { // the flag for XPAR is not wanted here
				if err := w.write("attack.jws", jws); err != nil {
					return false, "", err
				}
				r, err := w.try(ctx, "", "verify", "--ca", w.path("issuer", "ca.pem"), "--audience", "XLON", "--crl-url", "http://"+w.addresses.Public+"/crl", "--jws", w.path("attack.jws"))
				return r.code == 0, r.stderr, err
			}
			return w.verifies(ctx, jws, a.args...)
		}); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) attackHost(ctx context.Context) error {
	// A caller with another executable: the same program, one byte longer.
	b, err := os.ReadFile(w.inkan)
	if err != nil {
		return err
	}
	other := w.path("other-agent")
	if err := os.WriteFile(other, append(b, 0), 0o700); err != nil {
		return err
	}
	if err := w.attack("caller with another executable", "signer", "caller", func() (bool, string, error) {
		return w.signs(ctx, other, order(client.NewID()))
	}); err != nil {
		return err
	}
	// The key file on another TPM.
	thief, err := simulator.StartTPM(ctx, w.path("thief"))
	if err != nil {
		return err
	}
	defer func() { _ = thief.Kill() }() // it ends with this process anyway
	config, err := os.ReadFile(w.path("signer.yaml"))
	if err != nil {
		return err
	}
	if err := os.CopyFS(w.path("stolen"), os.DirFS(w.path("state"))); err != nil {
		return err
	}
	text := strings.NewReplacer("tpm: "+w.tpm.Address, "tpm: "+thief.Address, "state_dir: state", "state_dir: stolen", "run/signer.sock", "run/thief.sock").Replace(string(config))
	if err := w.write("thief.yaml", text); err != nil {
		return err
	}
	if err := w.attack("copied key file", "TPM", "belongs to another TPM", func() (bool, string, error) {
		r, err := w.try(ctx, "", "signer", "serve", "--config", w.path("thief.yaml"))
		return r.code == 0, r.stderr, err
	}); err != nil {
		return err
	}
	// The key used behind the signer's back, without its policy.
	return w.attack("key used with an empty password", "TPM", "TPM_RC_AUTH_UNAVAILABLE", func() (bool, string, error) {
		d, err := tpm.Open(w.tpm.Address)
		if err != nil {
			return false, "", err
		}
		defer d.Close()
		file, err := os.ReadFile(w.path("state", "mm-07", "action.tss2.pem"))
		if err != nil {
			return false, "", err
		}
		k, err := d.LoadKey(file, nil)
		if err != nil {
			return false, "", err
		}
		_, err = k.Sign(nil, make([]byte, 32), sha256Hash)
		return err == nil, fmt.Sprint(err), nil
	})
}

// said returns what the issuer answered.
func said(err error) (accepted bool, text string, _ error) {
	if err == nil {
		return true, "", nil
	}
	if p, ok := errors.AsType[*problem.Problem](err); ok {
		return false, p.Check + ": " + p.Detail, nil
	}
	return false, "", err
}

func (w *world) attackIssuer(ctx context.Context) error {
	ca, err := os.ReadFile(w.path("issuer", "ca.pem"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	issuer := attester.Issuer{URL: "https://" + w.addresses.Agent, Roots: roots}
	d, err := tpm.Open(w.tpm.Address)
	if err != nil {
		return err
	}
	defer d.Close()
	books, err := journal.Open(w.path("state", journal.FileName)) // else the issuer sees at once that something is off the books
	if err != nil {
		return err
	}
	defer books.Close()
	if err := d.StartAudit(books); err != nil {
		return err
	}
	var changeCSR func([]byte) []byte
	exchange := func(change func(*attest.Hello), forge func(*attester.Exchange, *attest.Evidence) error) (bool, string, error) {
		x, err := attester.Begin(ctx, issuer, d, "mm-07", change)
		if err != nil {
			return said(err)
		}
		defer x.Close()
		x.ChangeCSR, x.Journal = changeCSR, books
		ev, err := x.Collect(nil, nil)
		if err != nil {
			return false, "", err
		}
		if err := forge(x, ev); err != nil {
			return false, "", err
		}
		return said(x.Finish(ctx, ev))
	}
	nothing := func(*attester.Exchange, *attest.Evidence) error { return nil }
	var old attest.Evidence
	for _, a := range []struct {
		name, check string
		change      func(*attest.Hello)
		forge       func(*attester.Exchange, *attest.Evidence) error
	}{
		{"attestation key that signs anything", "A1", func(h *attest.Hello) {
			if _, public, err := d.CreateKey(tpm.SigningTemplate()); err == nil {
				h.AKPublic = public
			}
		}, nothing},
		{"evidence of an earlier exchange", "Q3", nil, func(x *attester.Exchange, ev *attest.Evidence) error {
			b, err := json.Marshal(ev)
			if err != nil {
				return err
			}
			if err := json.Unmarshal(b, &old); err != nil {
				return err
			}
			return x.Finish(ctx, ev) // it is good the first time
		}},
		{"earlier evidence under a new session", "K4", nil, func(_ *attester.Exchange, ev *attest.Evidence) error {
			session, secret := ev.Session, ev.Secret
			*ev = old
			ev.Session, ev.Secret = session, secret
			return nil
		}},
		{"PCR values that look better", "Q4", nil, func(_ *attester.Exchange, ev *attest.Evidence) error {
			ev.PCRs[0].Digest = make([]byte, 32)
			return nil
		}},
		{"EK that is not in the inventory", "E9", func(h *attest.Hello) {
			if eks, err := d.EKs(); err == nil && len(eks) > 1 {
				h.EKPublic, h.EKCertificate = eks[1].Public, eks[1].Certificate
			}
		}, nothing},
	} {
		if err := w.attack(a.name, "issuer", a.check, func() (bool, string, error) { return exchange(a.change, a.forge) }); err != nil {
			return err
		}
	}
	// The TPM certifies its own key for a request that is for the attacker's.
	changeCSR = func([]byte) []byte {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil
		}
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k)
		if err != nil {
			return nil
		}
		return csr
	}
	return w.attack("certificate for a key outside the TPM", "issuer", "K2", func() (bool, string, error) { return exchange(nil, nothing) })
}

func (w *world) attackLast(ctx context.Context) error {
	if err := w.attack("host changed after enrolment", "TPM", "PCR 7", func() (bool, string, error) {
		if err := w.tpm.ExtendPCR(7, []byte("another Secure Boot policy")); err != nil {
			return false, "", err
		}
		return w.signsByLog(ctx, order(client.NewID()))
	}); err != nil {
		return err
	}
	if err := w.attack("changed host renews", "TPM", "PCR 7", func() (bool, string, error) {
		r, err := w.try(ctx, "", "signer", "enrol", "--config", w.path("signer.yaml"))
		return r.code == 0, r.stderr, err
	}); err != nil {
		return err
	}
	list, err := w.run(ctx, "issuer", "certificate", "list", "--dir", w.path("issuer"), "--agent", "mm-07", "--json")
	if err != nil {
		return err
	}
	var certs []struct{ Serial, Profile string }
	if err := json.Unmarshal([]byte(list), &certs); err != nil {
		return err
	}
	for _, c := range certs {
		if c.Profile != "action" {
			continue
		}
		if _, err := w.run(ctx, "issuer", "certificate", "revoke", "--dir", w.path("issuer"), "--serial", c.Serial, "--reason", "keyCompromise"); err != nil {
			return err
		}
	}
	return w.attack("revoked certificate", "venue", "certificate_revoked", func() (bool, string, error) {
		return w.verifies(ctx, w.keptJWS)
	})
}
