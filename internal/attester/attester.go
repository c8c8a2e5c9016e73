// Package attester runs the host's side of enrolment and renewal: see [Run].
package attester

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"slices"

	"inkan/attest"
	"inkan/journal"
	"inkan/tpm"
)

// Issuer is whom to ask.
type Issuer struct {
	URL   string // https
	Roots *x509.CertPool
}

// Outcome is what an exchange ended with.
type Outcome struct {
	Grant    *attest.Grant
	Policies *tpm.Policies     // under which the keys work
	Keys     map[string][]byte // TSS2 PRIVATE KEY files by purpose
}

// Exchange is one exchange with the issuer, message by message. Close it.
type Exchange struct {
	Challenge attest.Challenge
	Outcome   *Outcome
	// ChangeCSR, if not nil, may change a certificate request before the TPM
	// certifies the key for it; it is for tests.
	ChangeCSR func(csr []byte) []byte
	// Journal is that of the device's signatures; nil where it keeps none.
	Journal *journal.Journal

	dev   *tpm.Device
	agent string
	ch    *Channel
	ek    *tpm.EK
}

// Run asks the issuer for an agent's certificates. keys holds the agent's key
// files by purpose; a key that is not there, or of another TPM, or not of the
// template that the issuer asks for, is made. save is called with the keys before the issuer sees
// their evidence, so that no certificate is issued for a key that was lost.
// A refusal of the issuer is a *problem.Problem.
// external holds keys that are not in the TPM, by purpose. books is the journal
// of the device's signatures, nil where it keeps none.
func Run(ctx context.Context, issuer Issuer, dev *tpm.Device, books *journal.Journal, agent string, keys map[string][]byte, external map[string]crypto.Signer, save func(map[string][]byte) error) (*Outcome, error) {
	x, err := Begin(ctx, issuer, dev, agent, nil)
	if err != nil {
		return nil, err
	}
	defer x.Close()
	x.Journal = books
	ev, err := x.Collect(keys, external)
	if err != nil {
		return nil, err
	}
	if err := save(x.Outcome.Keys); err != nil {
		return nil, fmt.Errorf("keeping the keys: %w", err)
	}
	if err := x.Finish(ctx, ev); err != nil {
		return nil, err
	}
	return x.Outcome, nil
}

// WithVendor adds to a key in an HSM what the HSM's maker says of it.
func WithVendor(k crypto.Signer, evidence []byte) crypto.Signer { return vouched{k, evidence} }

type vouched struct {
	crypto.Signer
	evidence []byte
}

// Policies asks the issuer under which policies an agent's keys work on this
// host now: the first two messages of an exchange that goes no further.
func Policies(ctx context.Context, issuer Issuer, dev *tpm.Device, agent string) (*tpm.Policies, error) {
	x, err := Begin(ctx, issuer, dev, agent, nil)
	if err != nil {
		return nil, err
	}
	defer x.Close()
	return x.policies(), nil
}

func (x *Exchange) policies() *tpm.Policies {
	c := &x.Challenge
	return &tpm.Policies{PolicyKey: c.PolicyKey, Ref: c.PolicyRef, Approved: c.Policies}
}

// Begin sends M1, which says who asks and from which device, and takes M2.
// change, if not nil, may change M1; it is for tests.
func Begin(ctx context.Context, issuer Issuer, dev *tpm.Device, agent string, change func(*attest.Hello)) (*Exchange, error) {
	ch, err := Dial(ctx, issuer.URL, issuer.Roots)
	if err != nil {
		return nil, err
	}
	x := &Exchange{dev: dev, agent: agent, ch: ch}
	hello, ek, err := hello(dev, agent)
	if err == nil {
		x.ek = ek
		if change != nil {
			change(hello)
		}
		err = ch.Post(ctx, "/v1/sessions", hello, &x.Challenge)
	}
	if err != nil {
		x.Close()
		return nil, err
	}
	return x, nil
}

// Close closes the connection.
func (x *Exchange) Close() { x.ch.Close() }

// Collect makes M3: what the challenge asks for.
func (x *Exchange) Collect(keys map[string][]byte, external map[string]crypto.Signer) (*attest.Evidence, error) {
	c := &x.Challenge
	ev := &attest.Evidence{Session: c.Session}
	if c.Credential != nil {
		secret, err := x.dev.ActivateCredential(x.ek, c.Credential)
		if err != nil {
			return nil, err
		}
		ev.Secret = secret
	}
	x.Outcome = &Outcome{Policies: x.policies(), Keys: make(map[string][]byte)}
	if c.Epoch != nil { // first: the keys work under the approvals of this epoch
		if _, err := x.dev.Epoch(c.Epoch.AtLeast); err != nil {
			return nil, err
		}
	}
	loaded, err := ensureKeys(x.dev, c, keys, external, x.Outcome)
	if err != nil {
		return nil, err
	}
	binding, err := x.ch.Binding()
	if err != nil {
		return nil, err
	}
	return ev, x.collect(loaded, binding, ev)
}

// Finish sends what the issuer asks for of the journal, then M3, and takes M4,
// the certificates.
func (x *Exchange) Finish(ctx context.Context, ev *attest.Evidence) error {
	if err := x.account(ctx, ev); err != nil {
		return err
	}
	x.Outcome.Grant = new(attest.Grant)
	if err := x.ch.Post(ctx, "/v1/sessions/evidence", ev, x.Outcome.Grant); err != nil {
		return err
	}
	x.Outcome.Policies.Approved = x.Outcome.Grant.Policies
	return nil
}

// account sends the journal from the testimony that the issuer has to the one in
// the evidence. What is not there is not sent: the issuer says what it makes of it.
func (x *Exchange) account(ctx context.Context, ev *attest.Evidence) error {
	c := &x.Challenge
	if ev.Audit == nil || x.Journal == nil || len(c.Testimony) == 0 {
		return nil
	}
	if len(c.Testimony) != sha256.Size {
		return fmt.Errorf("the issuer names a testimony with %d bytes, %d are expected", len(c.Testimony), sha256.Size)
	}
	err := x.Journal.Between([32]byte(c.Testimony), journal.TestimonyID(ev.Audit.Attest), func(lines []byte) error { return x.Part(ctx, lines) })
	if errors.Is(err, journal.ErrNoTestimony) {
		return nil
	}
	return err
}

// Part sends a part of the journal.
func (x *Exchange) Part(ctx context.Context, lines []byte) error {
	return x.ch.PostLines(ctx, fmt.Sprintf("/v1/sessions/%x/journal", x.Challenge.Session), lines)
}

// hello chooses the first endorsement key, which has a certificate if any has.
func hello(dev *tpm.Device, agent string) (*attest.Hello, *tpm.EK, error) {
	eks, err := dev.EKs()
	if err != nil {
		return nil, nil, err
	}
	if len(eks) == 0 {
		return nil, nil, errors.New("the TPM has no endorsement key")
	}
	ek := &eks[0]
	h := &attest.Hello{Agent: agent, EKCertificate: ek.Certificate, EKChain: ek.Chain, EKPublic: ek.Public}
	if h.AKPublic, err = dev.AKPublic(); err != nil {
		return nil, nil, err
	}
	h.SRKPublic, err = dev.SRKPublic()
	return h, ek, err
}

func ensureKeys(dev *tpm.Device, c *attest.Challenge, have map[string][]byte, external map[string]crypto.Signer, out *Outcome) ([]crypto.Signer, error) {
	var loaded []crypto.Signer
	for _, want := range c.Keys {
		if !slices.Contains([]string{attest.PurposeAction, attest.PurposeTLS, attest.PurposeCancel, attest.PurposeReserve}, want.Purpose) {
			return nil, fmt.Errorf("the issuer asks for a key for %.16q, which is not known here", want.Purpose)
		}
		other := external[want.Purpose]
		switch {
		case want.Protection == attest.ProtectionHSM && other == nil:
			return nil, fmt.Errorf("the issuer's inventory says that the %s key is in an HSM, and no key is configured there", want.Purpose)
		case want.Protection != attest.ProtectionHSM && other != nil:
			return nil, fmt.Errorf("a key in an HSM is configured for %s, and the issuer's inventory says that it is in the TPM", want.Purpose)
		case other != nil:
			loaded = append(loaded, other)
			continue
		}
		file := have[want.Purpose]
		if file != nil {
			k, err := dev.LoadKey(file, out.Policies)
			// The issuer knows this device, and the agent on it: a key of another TPM is
			// one from before this TPM was cleared or exchanged, and serves nobody any more.
			if err != nil && !errors.Is(err, tpm.ErrForeignKey) {
				return nil, err
			}
			if err == nil && attest.HasTemplate(k.PublicArea(), want.Template) {
				out.Keys[want.Purpose] = file
				loaded = append(loaded, k)
				continue
			}
		}
		file, _, err := dev.CreateKey(want.Template)
		if err != nil {
			return nil, err
		}
		k, err := dev.LoadKey(file, out.Policies)
		if err != nil {
			return nil, err
		}
		out.Keys[want.Purpose] = file
		loaded = append(loaded, k)
	}
	return loaded, nil
}

// collect certifies the keys and quotes the PCRs.
func (x *Exchange) collect(keys []crypto.Signer, binding []byte, ev *attest.Evidence) error {
	dev, c := x.dev, &x.Challenge
	for i, k := range keys {
		var csr []byte
		if c.Keys[i].Mode == "" { // a key that approvers stand before signs nothing but statements
			var err error
			if csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: x.agent}}, k); err != nil {
				return err
			}
		}
		if x.ChangeCSR != nil {
			csr = x.ChangeCSR(csr)
		}
		e := attest.KeyEvidence{Purpose: c.Keys[i].Purpose, CSR: csr}
		if inTPM, ok := k.(*tpm.Key); ok {
			q := attest.KeyQualifyingData(c.Session, c.Nonce, binding, csr)
			certify, err := dev.Certify(inTPM, q[:])
			if err != nil {
				return err
			}
			e.Public, e.Certify = inTPM.PublicArea(), &certify
		} else {
			var err error
			if e.SPKI, err = x509.MarshalPKIXPublicKey(k.Public()); err != nil {
				return err
			}
		}
		ev.Keys = append(ev.Keys, e)
	}
	q, err := attest.QuoteQualifyingData(c.Session, c.Nonce, binding, ev.Keys)
	if err != nil {
		return err
	}
	if ev.Quote, err = dev.Quote(c.PCRs, q[:]); err != nil {
		return err
	}
	if ev.PCRs, err = dev.ReadPCRs(c.PCRs); err != nil {
		return err
	}
	if dev.Audited() { // last: the requests above are among what was signed
		q = attest.TestimonyQualifyingData(c.Session, c.Nonce, binding)
		t, err := dev.Testify(q[:])
		if err != nil {
			return err
		}
		ev.Audit = &t
	}
	if c.Epoch == nil {
		return nil
	}
	q = attest.EpochQualifyingData(c.Session, c.Nonce, binding)
	epoch, err := dev.CertifyEpoch(q[:])
	ev.Epoch = &epoch
	return err
}

// Chain returns the certificate chain of a purpose, leaf first, after checking
// that it is for the key.
func (o *Outcome) Chain(purpose string, key crypto.PublicKey) ([]*x509.Certificate, error) {
	i := slices.IndexFunc(o.Grant.Certificates, func(c attest.Issued) bool { return c.Purpose == purpose })
	if i < 0 || len(o.Grant.Certificates[i].Chain) == 0 {
		return nil, fmt.Errorf("the issuer sent no certificate for the %s key", purpose)
	}
	var chain []*x509.Certificate
	for _, der := range o.Grant.Certificates[i].Chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("the issuer's certificate: %w", err)
		}
		chain = append(chain, c)
	}
	if k, ok := key.(interface{ Equal(crypto.PublicKey) bool }); !ok || !k.Equal(chain[0].PublicKey) {
		return nil, fmt.Errorf("the issuer's certificate is not for the %s key", purpose)
	}
	return chain, nil
}
