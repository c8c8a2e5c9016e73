package attest_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
	"inkan/internal/forge"
)

// fixture is one good exchange, from which each test forges one fault.
type fixture struct {
	dev    *forge.Device
	policy *ecdsa.PrivateKey
	x      attest.Expectation
}

var selection = []attest.PCRSelection{{Bank: "sha256", Indexes: []int{0, 2, 4, 7}}}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	f := &fixture{}
	var err error
	if f.dev, err = forge.New(); err != nil {
		t.Fatal(err)
	}
	if f.policy, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	area, err := attest.PolicyKeyPublic(&f.policy.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	ref := []byte("ref")
	approved, err := attest.SignPolicy(f.policy, "good", f.dev.Values(selection), ref)
	if err != nil {
		t.Fatal(err)
	}
	auth, err := attest.AuthPolicy(area, ref)
	if err != nil {
		t.Fatal(err)
	}
	pin, err := attest.SPKIDigest(f.dev.Hello.EKPublic)
	if err != nil {
		t.Fatal(err)
	}
	e, err := attest.VerifyEK(&f.dev.Hello, attest.EKOptions{Pin: pin[:], Now: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	f.x = attest.Expectation{
		Challenge: &attest.Challenge{Session: bytes.Repeat([]byte{1}, 16), Nonce: bytes.Repeat([]byte{2}, 32), PCRs: selection, PolicyKey: area, PolicyRef: ref, Policies: []attest.ApprovedPolicy{*approved},
			Keys: []attest.KeyRequest{{Purpose: attest.PurposeAction, Template: attest.KeyTemplate(auth)}, {Purpose: attest.PurposeTLS, Template: attest.KeyTemplate(auth)}}},
		Binding: bytes.Repeat([]byte{3}, 32), Endorsement: e, SRK: f.dev.Hello.SRKPublic, AK: f.dev.Hello.AKPublic, AuthPolicies: map[string][]byte{attest.ModeLocal: auth}, AppraisalNow: time.Now(),
	}
	return f
}

func (f *fixture) evidence(t testing.TB) *attest.Evidence {
	t.Helper()
	ev, err := f.dev.Evidence(f.x.Challenge, f.x.Binding)
	if err != nil {
		t.Fatal(err)
	}
	return ev
}

func TestAppraiseAcceptsGoodEvidence(t *testing.T) {
	f := newFixture(t)
	r, err := attest.Appraise(&f.x, f.evidence(t))
	if err != nil {
		t.Fatal(err)
	}
	if !r.Valid() || r.Policy() != "good" || r.Endorsement() != attest.Pinned || len(r.Keys()) != 2 || r.Clock().Resets != 5 {
		t.Errorf("result = %+v", r)
	}
	if (&attest.Result{}).Valid() || (*attest.Result)(nil).Valid() {
		t.Error("a result that Appraise did not make is valid")
	}
}

func TestAppraiseAcceptsKeyInHSM(t *testing.T) {
	f := newFixture(t)
	f.x.Challenge.Keys[0] = attest.KeyRequest{Purpose: attest.PurposeAction, Protection: attest.ProtectionHSM}
	r, err := attest.Appraise(&f.x, f.evidence(t))
	if err != nil {
		t.Fatal(err)
	}
	if k := r.Keys()[0]; k.Protection != attest.ProtectionHSM || k.Name != nil {
		t.Errorf("key = %+v", k)
	}
}

// otherKey is a P-256 public area of another key with the same template.
func otherKey(t testing.TB, template []byte) []byte {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p, err := forge.Public(template, &k.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// resign changes a signed structure and signs it again as the AK.
func (f *fixture) resign(t testing.TB, a *attest.Attested, change func([]byte) []byte) {
	t.Helper()
	var err error
	if *a, err = f.dev.Sign(change(bytes.Clone(a.Attest))); err != nil {
		t.Fatal(err)
	}
}

func onQuote(change func(*tpm2.TPMSAttest)) func(string, *tpm2.TPMSAttest) {
	return func(kind string, s *tpm2.TPMSAttest) {
		if kind == "quote" {
			change(s)
		}
	}
}

func onKey(change func(*tpm2.TPMSAttest)) func(string, *tpm2.TPMSAttest) {
	return func(kind string, s *tpm2.TPMSAttest) {
		if kind == attest.PurposeAction {
			change(s)
		}
	}
}

// TestForgedEvidence forges one fault each; the check that must refuse it is
// the first word of the name.
func TestForgedEvidence(t *testing.T) {
	attributes := func(change func(*tpm2.TPMAObject)) func(testing.TB, *fixture) {
		return func(_ testing.TB, f *fixture) {
			f.dev.ChangeKey = func(_ string, p *tpm2.TPMTPublic) { change(&p.ObjectAttributes) }
		}
	}
	ak := func(change func(*tpm2.TPMTPublic)) func(testing.TB, *fixture) {
		return func(t testing.TB, f *fixture) {
			p, err := tpm2.Unmarshal[tpm2.TPMTPublic](f.x.AK)
			if err != nil {
				t.Fatal(err)
			}
			change(p)
			f.x.AK = tpm2.Marshal(*p)
		}
	}
	clock := func(old attest.Clock) func(testing.TB, *fixture) {
		return func(_ testing.TB, f *fixture) { f.x.Clock = &old }
	}
	hsm := func(_ testing.TB, f *fixture) {
		f.x.Challenge.Keys[0] = attest.KeyRequest{Purpose: attest.PurposeAction, Protection: attest.ProtectionHSM}
	}
	type before = func(testing.TB, *fixture)
	type after = func(testing.TB, *fixture, *attest.Evidence)
	for name, forged := range map[string]struct {
		before before // what the device or the expectation is
		after  after  // what is sent
	}{
		"A1 AK that is not restricted": {before: ak(func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Restricted = false })},
		"A1 AK that also decrypts":     {before: ak(func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Decrypt = true })},
		"A1 AK that can be moved":      {before: ak(func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedTPM = false })},
		"A1 AK that was imported":      {before: ak(func(p *tpm2.TPMTPublic) { p.ObjectAttributes.SensitiveDataOrigin = false })},
		"A1 AK without a scheme": {before: ak(func(p *tpm2.TPMTPublic) {
			parms, _ := p.Parameters.ECCDetail()
			parms.Scheme = tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgNull}
		})},
		"A1 AK that is not a structure": {before: func(_ testing.TB, f *fixture) { f.x.AK = []byte{1, 2, 3} }},
		"Q1 AK of another device":       {before: func(t testing.TB, f *fixture) { f.x.AK = otherKey(t, attest.AKTemplate()) }, after: nil},
		"A3 secret that was guessed": {before: func(_ testing.TB, f *fixture) { f.x.Secret = bytes.Repeat([]byte{9}, 32) },
			after: func(_ testing.TB, _ *fixture, ev *attest.Evidence) { ev.Secret = bytes.Repeat([]byte{8}, 32) }},
		"A3 secret that is missing":          {before: func(_ testing.TB, f *fixture) { f.x.Secret = bytes.Repeat([]byte{9}, 32) }},
		"A3 secret that nobody asked for":    {after: func(_ testing.TB, _ *fixture, ev *attest.Evidence) { ev.Secret = []byte{1} }},
		"K1 certification of the wrong type": {after: func(_ testing.TB, _ *fixture, ev *attest.Evidence) { ev.Keys[0].Certify = &ev.Quote }},
		"K1 certification not by a TPM": {after: func(t testing.TB, f *fixture, ev *attest.Evidence) {
			f.resign(t, ev.Keys[0].Certify, func(b []byte) []byte { b[0] = 0; return b })
		}},
		"K1 certification changed": {after: func(_ testing.TB, _ *fixture, ev *attest.Evidence) { ev.Keys[0].Certify.Attest[40] ^= 1 }},
		"K1 certification with bytes behind": {after: func(t testing.TB, f *fixture, ev *attest.Evidence) {
			f.resign(t, ev.Keys[0].Certify, func(b []byte) []byte { return append(b, 0) })
		}},
		"K1 signature of another scheme":  {after: func(_ testing.TB, _ *fixture, ev *attest.Evidence) { ev.Keys[0].Certify.Signature[1] = 0x14 }},
		"K1 signature that is empty":      {after: func(_ testing.TB, _ *fixture, ev *attest.Evidence) { ev.Keys[0].Certify.Signature = nil }},
		"K2 certification of another key": {after: func(t testing.TB, _ *fixture, ev *attest.Evidence) { ev.Keys[0].Certify = ev.Keys[1].Certify }},
		"K2 request for another key":      {before: func(t testing.TB, f *fixture) { f.swapCSR(t) }},
		"K2 request that its key did not sign": {before: func(_ testing.TB, f *fixture) {
			f.dev.ChangeCSR = func(csr []byte) []byte { csr[len(csr)-1] ^= 1; return csr }
		}},
		"K2 request that is too large": {before: func(_ testing.TB, f *fixture) {
			f.dev.ChangeCSR = func([]byte) []byte { return make([]byte, 5<<10) }
		}},
		"K2 key for another purpose": {after: func(_ testing.TB, _ *fixture, ev *attest.Evidence) { ev.Keys[0].Purpose = "tls" }},
		"K2 a key too few":           {after: func(_ testing.TB, _ *fixture, ev *attest.Evidence) { ev.Keys = ev.Keys[:1] }},
		"K2 one key for two purposes": {before: func(t testing.TB, f *fixture) {
			k, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			f.dev.Keys["action"], f.dev.Keys["tls"] = k, k
		}},
		"K1 key that the TPM does not certify": {after: func(_ testing.TB, _ *fixture, ev *attest.Evidence) { ev.Keys[0].Certify = nil }},
		"K1 key with two spellings":            {after: func(_ testing.TB, _ *fixture, ev *attest.Evidence) { ev.Keys[0].SPKI = []byte{1} }},
		"K2 HSM key with a TPM's evidence": {after: func(_ testing.TB, f *fixture, _ *attest.Evidence) {
			f.x.Challenge.Keys[0].Protection = attest.ProtectionHSM
		}},
		"K2 HSM key that is malformed":   {before: hsm, after: func(_ testing.TB, _ *fixture, ev *attest.Evidence) { ev.Keys[0].SPKI = []byte{1} }},
		"K2 HSM request for another key": {before: func(t testing.TB, f *fixture) { hsm(t, f); f.swapCSR(t) }},
		"Q3 HSM key that the quote does not bind": {before: hsm, after: func(t testing.TB, f *fixture, ev *attest.Evidence) {
			k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			ev.Keys[0].SPKI, _ = x509.MarshalPKIXPublicKey(&k.PublicKey)
			ev.Keys[0].CSR, _ = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k)
		}},
		"K3 HSM key that is weak": {before: hsm, after: func(t testing.TB, f *fixture, ev *attest.Evidence) {
			k, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			ev.Keys[0].SPKI, _ = x509.MarshalPKIXPublicKey(&k.PublicKey)
		}},
		"K3 key that can be moved":        {before: attributes(func(a *tpm2.TPMAObject) { a.FixedTPM = false })},
		"K3 key whose parent can change":  {before: attributes(func(a *tpm2.TPMAObject) { a.FixedParent = false })},
		"K3 key that was imported":        {before: attributes(func(a *tpm2.TPMAObject) { a.SensitiveDataOrigin = false })},
		"K3 key that is restricted":       {before: attributes(func(a *tpm2.TPMAObject) { a.Restricted = true })},
		"K3 key that decrypts":            {before: attributes(func(a *tpm2.TPMAObject) { a.Decrypt = true })},
		"K3 key that a password uses":     {before: attributes(func(a *tpm2.TPMAObject) { a.UserWithAuth = true })},
		"K3 key that does not sign":       {before: attributes(func(a *tpm2.TPMAObject) { a.SignEncrypt = false })},
		"K3 key that locks the TPM out":   {before: attributes(func(a *tpm2.TPMAObject) { a.NoDA = false })},
		"K3 key whose admin has a policy": {before: attributes(func(a *tpm2.TPMAObject) { a.AdminWithPolicy = true })},
		"K3 key with another policy": {before: func(_ testing.TB, f *fixture) {
			f.dev.ChangeKey = func(_ string, p *tpm2.TPMTPublic) { p.AuthPolicy.Buffer = make([]byte, 32) }
		}},
		"K3 key without a policy": {before: func(_ testing.TB, f *fixture) {
			f.dev.ChangeKey = func(_ string, p *tpm2.TPMTPublic) { p.AuthPolicy.Buffer = nil }
		}},
		"K4 certification of another session": {before: func(_ testing.TB, f *fixture) {
			f.dev.Change = onKey(func(s *tpm2.TPMSAttest) { s.ExtraData.Buffer[0] ^= 1 })
		}},
		"K4 certification over another channel": {before: func(_ testing.TB, f *fixture) {}, after: func(_ testing.TB, f *fixture, _ *attest.Evidence) {
			f.x.Binding = bytes.Repeat([]byte{4}, 32)
		}},
		"K5 certification by another AK": {before: func(_ testing.TB, f *fixture) {
			f.dev.Change = onKey(func(s *tpm2.TPMSAttest) { s.QualifiedSigner.Buffer[5] ^= 1 })
		}},
		"K7 key outside the owner hierarchy": {before: func(_ testing.TB, f *fixture) {
			f.dev.Change = onKey(func(s *tpm2.TPMSAttest) { info, _ := s.Attested.Certify(); info.QualifiedName.Buffer[5] ^= 1 })
		}},
		"K7 SRK of another template": {before: func(t testing.TB, f *fixture) { f.x.SRK = otherKey(t, attest.AKTemplate()) }},
		"Q1 quote changed":           {after: func(_ testing.TB, _ *fixture, ev *attest.Evidence) { ev.Quote.Attest[60] ^= 1 }},
		"Q1 quote by another AK": {before: func(_ testing.TB, f *fixture) {
			f.dev.Change = onQuote(func(s *tpm2.TPMSAttest) { s.QualifiedSigner.Buffer[5] ^= 1 })
		}},
		"Q2 quote of the wrong type": {after: func(_ testing.TB, _ *fixture, ev *attest.Evidence) { ev.Quote = *ev.Keys[0].Certify }},
		"Q3 quote of another session": {before: func(_ testing.TB, f *fixture) {
			f.dev.Change = onQuote(func(s *tpm2.TPMSAttest) { s.ExtraData.Buffer[0] ^= 1 })
		}},
		"Q3 session that is another": {after: func(_ testing.TB, _ *fixture, ev *attest.Evidence) { ev.Session = make([]byte, 16) }},
		"Q4 other PCRs quoted": {before: func(_ testing.TB, f *fixture) {
			f.dev.Change = onQuote(func(s *tpm2.TPMSAttest) { q, _ := s.Attested.Quote(); q.PCRSelect.PCRSelections[0].PCRSelect[0] = 1 })
		}},
		"Q4 no PCRs quoted": {before: func(_ testing.TB, f *fixture) {
			f.dev.Change = onQuote(func(s *tpm2.TPMSAttest) { q, _ := s.Attested.Quote(); q.PCRSelect.PCRSelections = nil })
		}},
		"Q4 values of other PCRs":    {after: func(_ testing.TB, _ *fixture, ev *attest.Evidence) { ev.PCRs[0].Index = 1 }},
		"Q4 values that look better": {after: func(_ testing.TB, _ *fixture, ev *attest.Evidence) { ev.PCRs[0].Digest = make([]byte, 32) }},
		"Q4 a value too few":         {after: func(_ testing.TB, _ *fixture, ev *attest.Evidence) { ev.PCRs = ev.PCRs[:3] }},
		"Q4 values of another bank":  {after: func(_ testing.TB, _ *fixture, ev *attest.Evidence) { ev.PCRs[0].Bank = "sha1" }},
		"Q5 PCR that anyone resets": {before: func(_ testing.TB, f *fixture) {}, after: func(_ testing.TB, f *fixture, _ *attest.Evidence) {
			f.x.Challenge.PCRs = []attest.PCRSelection{{Bank: "sha256", Indexes: []int{16}}}
		}},
		"Q6 clock that is not safe":  {before: func(_ testing.TB, f *fixture) { f.dev.Clock.Safe = false }},
		"Q6 clock that went back":    {before: clock(attest.Clock{Milliseconds: 2000, Resets: 5, Restarts: 1})},
		"Q6 resets that went back":   {before: clock(attest.Clock{Milliseconds: 1, Resets: 6})},
		"Q6 restarts that went back": {before: clock(attest.Clock{Milliseconds: 1, Resets: 5, Restarts: 2})},
		"Q7 firmware that is old":    {before: func(_ testing.TB, f *fixture) { f.x.MinFirmware = 3 }},
		"Q8 a bank nobody asked for": {before: func(_ testing.TB, f *fixture) {
			f.dev.Change = onQuote(func(s *tpm2.TPMSAttest) {
				q, _ := s.Attested.Quote()
				q.PCRSelect.PCRSelections = append(q.PCRSelect.PCRSelections, tpm2.TPMSPCRSelection{Hash: tpm2.TPMAlgSHA1, PCRSelect: []byte{1, 0, 0}})
			})
		}},
		"P1 host in another state":     {before: func(_ testing.TB, f *fixture) { f.dev.PCRs[7] = make([]byte, 32) }},
		"P1 policy by another key":     {after: func(_ testing.TB, f *fixture, _ *attest.Evidence) { f.x.Challenge.Policies[0].Signature[10] ^= 1 }},
		"P1 no policy":                 {after: func(_ testing.TB, f *fixture, _ *attest.Evidence) { f.x.Challenge.Policies = nil }},
		"G1 expectation without nonce": {after: func(_ testing.TB, f *fixture, _ *attest.Evidence) { f.x.Challenge.Nonce = nil }},
		"G1 no endorsement":            {after: func(_ testing.TB, f *fixture, _ *attest.Evidence) { f.x.Endorsement = nil }},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			if forged.before != nil {
				forged.before(t, f)
			}
			ev := f.evidence(t)
			if forged.after != nil {
				forged.after(t, f, ev)
			}
			check, _, _ := strings.Cut(name, " ")
			if name == "Q1 AK of another device" {
				check = "K1" // the certifications come first, and are not signed by it either
			}
			r, err := attest.Appraise(&f.x, ev)
			if !errors.Is(err, &attest.Refusal{Check: check}) || r != nil {
				t.Errorf("got %v, want a refusal by %s", err, check)
			}
		})
	}
}

// swapCSR lets the TPM certify its key for a request that is for another.
func (f *fixture) swapCSR(t testing.TB) {
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, other)
	if err != nil {
		t.Fatal(err)
	}
	f.dev.ChangeCSR = func([]byte) []byte { return csr }
}

// TestEveryCheckIsListed: a check that refuses has its line in Checks.
func TestEveryCheckIsListed(t *testing.T) {
	seen := make(map[string]bool)
	for _, c := range attest.Checks {
		if seen[c.ID] || c.What == "" {
			t.Errorf("check %s stands twice or says nothing", c.ID)
		}
		seen[c.ID] = true
	}
}

func FuzzAppraise(f *testing.F) {
	x := newFixture(f)
	ev := x.evidence(f)
	f.Add(ev.Quote.Attest, ev.Quote.Signature, ev.Keys[0].Public, ev.Keys[0].CSR)
	f.Fuzz(func(t *testing.T, quote, signature, public, csr []byte) {
		e := *ev
		e.Keys = append([]attest.KeyEvidence(nil), ev.Keys...)
		changed := !bytes.Equal(quote, ev.Quote.Attest) || !bytes.Equal(signature, ev.Quote.Signature) || !bytes.Equal(public, ev.Keys[0].Public) || !bytes.Equal(csr, ev.Keys[0].CSR)
		e.Quote = attest.Attested{Attest: quote, Signature: signature}
		e.Keys[0].Public, e.Keys[0].CSR = public, csr
		if _, err := attest.Appraise(&x.x, &e); err == nil && changed {
			t.Error("changed evidence was accepted")
		}
		// The same bytes signed by the AK reach the parsers behind the signature.
		if a, err := x.dev.Sign(quote); err == nil {
			e.Quote = a
			_, _ = attest.Appraise(&x.x, &e) // it must not crash
		}
	})
}

func BenchmarkAppraise(b *testing.B) {
	f := newFixture(b)
	ev := f.evidence(b)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := attest.Appraise(&f.x, ev); err != nil {
				b.Fatal(err)
			}
		}
	})
}
