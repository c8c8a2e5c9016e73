package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"os"
	"strings"
	"time"

	keyfile "github.com/foxboron/go-tpm-keyfiles"
	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"inkan/attest"
	"inkan/audit"
	"inkan/internal/jws"
	"inkan/internal/problem"
	"inkan/internal/strictjson"
	"inkan/scope"
	"inkan/signer"
	"inkan/signer/client"
	"inkan/simulator"
	"inkan/tpm"
)

// root is somebody who has the host: its files, its TPM, its network.
type root struct {
	w        *world
	link     transport.TPMCloser
	policies tpm.Policies
	approved attest.ApprovedPolicy // with the approver
	local    attest.ApprovedPolicy // without
	chain    []*x509.Certificate   // of the action key
	header   *jws.Header
	http     *http.Client // with the agent's TLS key, which root may use
	key      *tpm2.NamedHandle
	open     []tpm2.TPMHandle // what was made for the attack under way
}

func (w *world) newRoot() (*root, error) {
	r := &root{w: w}
	state, err := signer.OpenState(w.path("state"), "mm-07")
	if err != nil {
		return nil, err
	}
	if ok, err := state.Policies(&r.policies); err != nil || !ok {
		return nil, fmt.Errorf("policies: %w", err)
	}
	for _, p := range r.policies.Approved {
		if p.Mode() == attest.ModeApprover {
			r.approved = p
		} else {
			r.local = p
		}
	}
	if r.chain, err = state.Chain(attest.PurposeAction); err != nil {
		return nil, err
	}
	if r.header, err = jws.NewHeader("ES256", r.chain, true); err != nil {
		return nil, err
	}
	return r, r.connect(state)
}

// connect opens a connection to the approver that stays open: its handshake
// takes the TLS key in the TPM, which an attack under way must not be disturbed by.
func (r *root) connect(state *signer.State) error {
	d, err := tpm.Open(r.w.tpm.Address)
	if err != nil {
		return err
	}
	defer d.Close()
	keys, err := state.Keys(attest.PurposeTLS)
	if err != nil {
		return err
	}
	k, err := d.LoadKey(keys[attest.PurposeTLS], &r.policies)
	if err != nil {
		return err
	}
	chain, err := state.Chain(attest.PurposeTLS)
	if err != nil {
		return err
	}
	pair := tls.Certificate{PrivateKey: k}
	for _, c := range chain {
		pair.Certificate = append(pair.Certificate, c.Raw)
	}
	b, err := os.ReadFile(r.w.path("approver", "tls.pem"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(b)
	r.http = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxConnsPerHost: 1, TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS13}}}
	res, err := r.http.Get("https://" + r.w.approverAt[0] + "/v1/approver")
	if err != nil {
		return err
	}
	defer res.Body.Close()
	_, err = io.Copy(io.Discard, res.Body)
	return err
}

// begin takes the TPM and loads the action key; end leaves nothing behind.
func (r *root) begin() (err error) {
	if r.link, err = linuxudstpm.Open(r.w.tpm.Address); err != nil {
		return err
	}
	file, err := os.ReadFile(r.w.path("state", "mm-07", "action.tss2.pem"))
	if err != nil {
		return err
	}
	r.key, err = r.load(file)
	return err
}

func (r *root) end() {
	for _, h := range r.open {
		_, _ = tpm2.FlushContext{FlushHandle: h}.Execute(r.link) // the TPM may have dropped it
	}
	r.open = nil
	_ = r.link.Close()
}

func (r *root) keep(h tpm2.TPMHandle) { r.open = append(r.open, h) }

// load loads a key file below the storage root key.
func (r *root) load(file []byte) (*tpm2.NamedHandle, error) {
	f, err := keyfile.Decode(file)
	if err != nil {
		return nil, err
	}
	template, err := tpm2.Unmarshal[tpm2.TPMTPublic](attest.SRKTemplate())
	if err != nil {
		return nil, err
	}
	srk, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(*template)}.Execute(r.link)
	if err != nil {
		return nil, err
	}
	defer func() { _, _ = tpm2.FlushContext{FlushHandle: srk.ObjectHandle}.Execute(r.link) }() // else the TPM has it
	k, err := tpm2.Load{ParentHandle: tpm2.NamedHandle{Handle: srk.ObjectHandle, Name: srk.Name}, InPrivate: f.Privkey, InPublic: f.Pubkey}.Execute(r.link)
	if err != nil {
		return nil, err
	}
	r.keep(k.ObjectHandle)
	return &tpm2.NamedHandle{Handle: k.ObjectHandle, Name: k.Name}, nil
}

// external loads a public key.
func (r *root) external(area []byte, hierarchy tpm2.TPMHandle) (*tpm2.NamedHandle, error) {
	p, err := tpm2.Unmarshal[tpm2.TPMTPublic](area)
	if err != nil {
		return nil, err
	}
	k, err := tpm2.LoadExternal{InPublic: tpm2.New2B(*p), Hierarchy: hierarchy}.Execute(r.link)
	if err != nil {
		return nil, err
	}
	r.keep(k.ObjectHandle)
	return &tpm2.NamedHandle{Handle: k.ObjectHandle, Name: k.Name}, nil
}

// flush gives one place back: the TPM has three.
func (r *root) flush(h tpm2.TPMHandle) { _, _ = tpm2.FlushContext{FlushHandle: h}.Execute(r.link) }

func (r *root) session() (tpm2.Session, error) {
	s, _, err := tpm2.PolicySession(r.link, tpm2.TPMAlgSHA256, attest.NonceTPMSize)
	if err == nil {
		r.keep(s.Handle())
	}
	return s, err
}

// pcr is TPM2_PolicyPCR.
func (r *root) pcr(s tpm2.Session, p attest.ApprovedPolicy) error {
	sel, err := attest.SelectionOf(p.PCRs)
	if err != nil {
		return err
	}
	l, err := attest.Selection(sel)
	if err != nil {
		return err
	}
	_, err = tpm2.PolicyPCR{PolicySession: s.Handle(), PcrDigest: tpm2.TPM2BDigest{Buffer: attest.PCRDigest(p.PCRs)}, Pcrs: *l}.Execute(r.link)
	return err
}

// signed is TPM2_PolicySigned with an authorization.
func (r *root) signed(s tpm2.Session, area, nonce []byte, cpHash []byte, expiration int32, ref, signature []byte) error {
	k, err := r.external(area, tpm2.TPMRHNull)
	if err != nil {
		return err
	}
	defer r.flush(k.Handle)
	sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](signature)
	if err != nil {
		return err
	}
	_, err = tpm2.PolicySigned{AuthObject: *k, PolicySession: s.Handle(), NonceTPM: tpm2.TPM2BNonce{Buffer: nonce}, CPHashA: tpm2.TPM2BDigest{Buffer: cpHash},
		PolicyRef: tpm2.TPM2BNonce{Buffer: ref}, Expiration: expiration, Auth: *sig}.Execute(r.link)
	return err
}

// authorize is TPM2_PolicyAuthorize with the policy key's genuine approval.
func (r *root) authorize(s tpm2.Session, p attest.ApprovedPolicy) error {
	k, err := r.external(r.policies.PolicyKey, tpm2.TPMRHOwner)
	if err != nil {
		return err
	}
	defer r.flush(k.Handle)
	digest, err := attest.PolicyDigest(&p, r.policies.Ref)
	if err != nil {
		return err
	}
	ref := r.policies.Ref
	if p.Mode() == attest.ModeApprover {
		ref = attest.ApproverPolicyRef(ref)
	}
	approval := attest.Approval(digest, ref)
	sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](p.Signature)
	if err != nil {
		return err
	}
	ticket, err := tpm2.VerifySignature{KeyHandle: *k, Digest: tpm2.TPM2BDigest{Buffer: approval[:]}, Signature: *sig}.Execute(r.link)
	if err != nil {
		return err
	}
	_, err = tpm2.PolicyAuthorize{PolicySession: s.Handle(), ApprovedPolicy: tpm2.TPM2BDigest{Buffer: digest}, PolicyRef: tpm2.TPM2BDigest{Buffer: ref}, KeySign: k.Name, CheckTicket: ticket.Validation}.Execute(r.link)
	return err
}

// sign is TPM2_Sign.
func (r *root) sign(k *tpm2.NamedHandle, digest [32]byte, auth tpm2.Session) error {
	_, err := tpm2.Sign{
		KeyHandle: tpm2.AuthHandle{Handle: k.Handle, Name: k.Name, Auth: auth}, Digest: tpm2.TPM2BDigest{Buffer: digest[:]},
		InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSchemeHash{HashAlg: tpm2.TPMAlgSHA256})},
		Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
	}.Execute(r.link)
	return err
}

// ask sends a request to the approver, as the agent's host may.
func (r *root) ask(request map[string]any) (*attest.Authorization, error) {
	b, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	res, err := r.http.Post("https://"+r.w.approverAt[0]+"/v1/authorizations", "application/json", bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		return nil, problem.Parse(res.StatusCode, res.Header.Get("Content-Type"), body)
	}
	var a attest.Authorization
	return &a, strictjson.Unmarshal(body, 1<<20, &a)
}

// request asks for an authorization of a statement.
func (r *root) request(statement, nonce []byte) map[string]any {
	var chain [][]byte
	for _, c := range r.chain {
		chain = append(chain, c.Raw)
	}
	return map[string]any{"chain": chain, "nonce": nonce, "statement": statement}
}

// honest has an order signed through the front door and returns its statement:
// one that the approver will authorize again, since it is the same action.
func (r *root) honest(ctx context.Context) ([]byte, [32]byte, error) {
	signed, err := r.w.try(ctx, order(client.NewID()), "sign", "--socket", r.w.socket(), "--action", "-")
	if err == nil && signed.code != 0 {
		err = errors.New(signed.stderr)
	}
	if err != nil {
		return nil, [32]byte{}, err
	}
	statement := decode(strings.Split(strings.TrimSpace(signed.stdout), ".")[1])
	return statement, sha256.Sum256(r.header.SigningInput(statement)), r.quiet()
}

// quiet waits until the signer has left the TPM to others.
func (r *root) quiet() error {
	time.Sleep(250 * time.Millisecond)
	return nil
}

// forged is the statement that root would like to be signed: right in all but
// what change does to it.
func (r *root) forged(ctx context.Context, change func(*scope.Statement)) ([]byte, error) {
	s, err := audit.OpenSnapshot(ctx, r.w.path("state", "mm-07", "log.db"))
	if err != nil {
		return nil, err
	}
	defer s.Close()
	var last []byte
	for e, err := range s.Entries(ctx) {
		if err != nil {
			return nil, err
		}
		last = e.Statement
	}
	st, err := scope.ParseStatement(last)
	if err != nil {
		return nil, err
	}
	now := time.Now().UTC().Truncate(time.Microsecond)
	st.Previous, st.Counter, st.ID = sha256.Sum256(last), st.Counter+1, client.NewID()
	st.Time, st.Expires = scope.Timestamp{Time: now}, now.Add(30*time.Second).Unix()
	change(st)
	return st.Marshal()
}

// code returns the TPM's own response code, by its name.
func code(err error) string {
	if err == nil {
		return "signed"
	}
	return err.Error()
}

// attacksAsRoot carries out what root on the agent's host can think of.
func (w *world) attacksAsRoot(ctx context.Context) error {
	w.title("6. Root on the agent's host, with its own code, against the TPM")
	r, err := w.newRoot()
	if err != nil {
		return err
	}
	for _, group := range []func(context.Context) error{r.withoutApprover, r.withAuthorization, r.attackApprover, r.elsewhere} {
		if err := group(ctx); err != nil {
			return err
		}
	}
	w.title("10. The same order through the front door")
	if _, err := w.run(ctx, "sign", "--socket", w.socket(), "--action", w.path("order.json"), "--new-id"); err != nil {
		return err
	}
	w.say("   signed")
	w.title("11. Root changes the host")
	return r.changed(ctx)
}

// tpmAttack is an attack that the TPM must answer with a response code.
func (r *root) tpmAttack(name, rc string, f func() error) error {
	return r.w.attack(name, "TPM", rc, func() (bool, string, error) {
		if err := r.begin(); err != nil {
			return false, "", err
		}
		defer r.end()
		err := f()
		return err == nil, code(err), nil
	})
}

// withoutApprover: everything that root has by itself.
func (r *root) withoutApprover(ctx context.Context) error {
	if err := r.quiet(); err != nil {
		return err
	}
	digest := sha256.Sum256([]byte("an order of root's own"))
	policy := func(steps ...func(tpm2.Session) error) func() error {
		return func() error {
			s, err := r.session()
			if err != nil {
				return err
			}
			for _, step := range steps {
				if err := step(s); err != nil {
					return err
				}
			}
			return r.sign(r.key, digest, s)
		}
	}
	pcr := func(s tpm2.Session) error { return r.pcr(s, r.approved) }
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	ownArea, err := attest.PolicyKeyPublic(&own.PublicKey)
	if err != nil {
		return err
	}
	for _, a := range []struct {
		name, rc string
		f        func() error
	}{
		{"sign with no session at all", "TPM_RC_AUTH_MISSING", func() error { return r.signNoSession(digest) }},
		{"sign with an empty password", "TPM_RC_AUTH_UNAVAILABLE", func() error { return r.sign(r.key, digest, tpm2.PasswordAuth(nil)) }},
		{"sign with an HMAC session", "TPM_RC_AUTH_UNAVAILABLE", func() error { return r.sign(r.key, digest, tpm2.HMAC(tpm2.TPMAlgSHA256, 16)) }},
		{"sign with an empty policy", "TPM_RC_POLICY_FAIL", policy()},
		{"PolicyPCR alone", "TPM_RC_POLICY_FAIL", policy(pcr)},
		{"the approval for local keys", "TPM_RC_POLICY_FAIL", policy(func(s tpm2.Session) error { return r.pcr(s, r.local) }, func(s tpm2.Session) error { return r.authorize(s, r.local) })},
		{"the approval, but no authorization", "TPM_RC_VALUE", policy(pcr, func(s tpm2.Session) error { return r.authorize(s, r.approved) })},
		{"authorization by root's own key", "TPM_RC_VALUE", policy(pcr, func(s tpm2.Session) error {
			nonce, cp := s.NonceTPM().Buffer, attest.SignCommandHash(r.key.Name.Buffer, digest)
			x, err := attest.Authorize(own, nonce, cp, r.policies.Ref)
			if err != nil {
				return err
			}
			return r.signed(s, ownArea, nonce, cp[:], x.Expiration, attest.AuthorizationRef(r.policies.Ref), x.Signature)
		}, func(s tpm2.Session) error { return r.authorize(s, r.approved) })},
	} {
		if err := r.tpmAttack(a.name, a.rc, a.f); err != nil {
			return err
		}
	}
	return nil
}

// signNoSession is TPM2_Sign by hand, with the tag TPM_ST_NO_SESSIONS.
func (r *root) signNoSession(digest [32]byte) error {
	b := []byte{0x80, 0x01, 0, 0, 0, 0, 0, 0, 0x01, 0x5d}
	b = binary.BigEndian.AppendUint32(b, uint32(r.key.Handle))
	b = append(append(b, 0, 32), digest[:]...)
	b = append(b, 0x00, 0x18, 0x00, 0x0b, 0x80, 0x24, 0x40, 0x00, 0x00, 0x07, 0x00, 0x00)
	binary.BigEndian.PutUint32(b[2:], uint32(len(b)))
	rsp, err := r.link.Send(b)
	if err != nil {
		return err
	}
	if rc := tpm2.TPMRC(binary.BigEndian.Uint32(rsp[6:])); rc != tpm2.TPMRCSuccess {
		return rc
	}
	return nil
}

// withAuthorization: root has a genuine authorization, for an honest order.
func (r *root) withAuthorization(ctx context.Context) error {
	r.w.title("7. Root with a genuine authorization of the approver, for an honest order")
	ref := attest.AuthorizationRef(r.policies.Ref)
	area := r.approved.Approvers[0]
	var recorded struct {
		nonce []byte
		x     *attest.Authorization
	}
	for _, a := range []struct {
		name, rc string
		f        func(statement []byte, digest [32]byte) error
	}{
		{"used for another digest", "TPM_RC_POLICY_FAIL", func(statement []byte, digest [32]byte) error {
			s, err := r.satisfied(statement, digest, area, ref)
			if err != nil {
				return err
			}
			return r.sign(r.key, sha256.Sum256([]byte("an order of root's own")), s)
		}},
		{"used for another key of the same policy", "TPM_RC_POLICY_FAIL", func(statement []byte, digest [32]byte) error {
			s, err := r.satisfied(statement, digest, area, ref)
			if err != nil {
				return err
			}
			r.flush(r.key.Handle)
			other, err := r.create()
			if err != nil {
				return err
			}
			return r.sign(other, digest, s)
		}},
		{"used twice", "TPM_RC_POLICY_FAIL", func(statement []byte, digest [32]byte) error {
			s, err := r.satisfied(statement, digest, area, ref)
			if err != nil {
				return err
			}
			if err := r.sign(r.key, digest, s); err != nil {
				return fmt.Errorf("the honest order was not signed: %w", err)
			}
			return r.sign(r.key, digest, s)
		}},
		{"in another session, with its old nonce", "TPM_RC_NONCE", func(statement []byte, digest [32]byte) error {
			first, err := r.session()
			if err != nil {
				return err
			}
			recorded.nonce = bytes.Clone(first.NonceTPM().Buffer)
			if recorded.x, err = r.ask(r.request(statement, recorded.nonce)); err != nil {
				return err
			}
			r.flush(first.Handle())
			s, err := r.session()
			if err != nil {
				return err
			}
			cp := attest.SignCommandHash(r.key.Name.Buffer, digest)
			return r.signed(s, area, recorded.nonce, cp[:], recorded.x.Expiration, ref, recorded.x.Signature)
		}},
		{"in another session, with that one's nonce", "TPM_RC_SIGNATURE", func(_ []byte, digest [32]byte) error {
			s, err := r.session()
			if err != nil {
				return err
			}
			cp := attest.SignCommandHash(r.key.Name.Buffer, digest)
			return r.signed(s, area, s.NonceTPM().Buffer, cp[:], recorded.x.Expiration, ref, recorded.x.Signature)
		}},
		{"with a later expiration", "TPM_RC_SIGNATURE", func(statement []byte, digest [32]byte) error {
			s, x, err := r.asked(statement)
			if err != nil {
				return err
			}
			cp := attest.SignCommandHash(r.key.Name.Buffer, digest)
			return r.signed(s, area, s.NonceTPM().Buffer, cp[:], 3600, ref, x.Signature)
		}},
		{"with another policyRef", "TPM_RC_SIGNATURE", func(statement []byte, digest [32]byte) error {
			s, x, err := r.asked(statement)
			if err != nil {
				return err
			}
			cp := attest.SignCommandHash(r.key.Name.Buffer, digest)
			return r.signed(s, area, s.NonceTPM().Buffer, cp[:], x.Expiration, nil, x.Signature)
		}},
		{"with the command left open", "TPM_RC_SIGNATURE", func(statement []byte, _ [32]byte) error {
			s, x, err := r.asked(statement)
			if err != nil {
				return err
			}
			return r.signed(s, area, s.NonceTPM().Buffer, nil, x.Expiration, ref, x.Signature)
		}},
		{"with the session left open", "TPM_RC_SIGNATURE", func(statement []byte, digest [32]byte) error {
			s, x, err := r.asked(statement)
			if err != nil {
				return err
			}
			cp := attest.SignCommandHash(r.key.Name.Buffer, digest)
			return r.signed(s, area, nil, cp[:], x.Expiration, ref, x.Signature)
		}},
		{"a recorded conversation, replayed", "TPM_RC_NONCE", func(statement []byte, digest [32]byte) error {
			x, err := r.ask(r.request(statement, recorded.nonce)) // it is the same action: the approver answers
			if err != nil {
				return err
			}
			s, err := r.session()
			if err != nil {
				return err
			}
			cp := attest.SignCommandHash(r.key.Name.Buffer, digest)
			return r.signed(s, area, recorded.nonce, cp[:], x.Expiration, ref, x.Signature)
		}},
		{"after it expired (root's own key, 1 s)", "TPM_RC_EXPIRED", func([]byte, [32]byte) error { return r.expired(ref) }},
	} {
		statement, digest, err := r.honest(ctx)
		if err != nil {
			return err
		}
		if err := r.tpmAttack(a.name, a.rc, func() error { return a.f(statement, digest) }); err != nil {
			return err
		}
	}
	return nil
}

// asked begins a session and gets the approver's authorization for it.
func (r *root) asked(statement []byte) (tpm2.Session, *attest.Authorization, error) {
	s, err := r.session()
	if err != nil {
		return nil, nil, err
	}
	x, err := r.ask(r.request(statement, s.NonceTPM().Buffer))
	return s, x, err
}

// satisfied is a session whose whole policy is satisfied, for an honest order.
func (r *root) satisfied(statement []byte, digest [32]byte, area, ref []byte) (tpm2.Session, error) {
	cp := attest.SignCommandHash(r.key.Name.Buffer, digest)
	s, x, err := r.asked(statement)
	if err != nil {
		return nil, err
	}
	for _, step := range []func() error{
		func() error { return r.pcr(s, r.approved) },
		func() error { return r.signed(s, area, s.NonceTPM().Buffer, cp[:], x.Expiration, ref, x.Signature) },
		func() error { return r.authorize(s, r.approved) },
	} {
		if err := step(); err != nil {
			return nil, fmt.Errorf("the honest order's policy: %w", err)
		}
	}
	return s, nil
}

// create makes another key in approver mode.
func (r *root) create() (*tpm2.NamedHandle, error) {
	auth, err := attest.KeyPolicy(attest.ModeApprover, r.policies.PolicyKey, r.policies.Ref)
	if err != nil {
		return nil, err
	}
	t, err := tpm2.Unmarshal[tpm2.TPMTPublic](attest.KeyTemplate(auth))
	if err != nil {
		return nil, err
	}
	k, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(*t)}.Execute(r.link)
	if err != nil {
		return nil, err
	}
	r.keep(k.ObjectHandle)
	return &tpm2.NamedHandle{Handle: k.ObjectHandle, Name: k.Name}, nil
}

// expired shows that the TPM counts: an authorization of one second, by a key
// of root's own, is tried after it.
func (r *root) expired(ref []byte) error {
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	area, err := attest.PolicyKeyPublic(&own.PublicKey)
	if err != nil {
		return err
	}
	s, err := r.session()
	if err != nil {
		return err
	}
	nonce, cp := s.NonceTPM().Buffer, attest.SignCommandHash(r.key.Name.Buffer, sha256.Sum256(nil))
	hash := sha256.Sum256(bytes.Join([][]byte{nonce, {0, 0, 0, 1}, cp[:], ref}, nil))
	der, err := own.Sign(rand.Reader, hash[:], crypto.SHA256)
	if err != nil {
		return err
	}
	var rs struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &rs); err != nil {
		return err
	}
	sig := tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{Hash: tpm2.TPMAlgSHA256,
		SignatureR: tpm2.TPM2BECCParameter{Buffer: rs.R.Bytes()}, SignatureS: tpm2.TPM2BECCParameter{Buffer: rs.S.Bytes()}})})
	time.Sleep(1500 * time.Millisecond)
	return r.signed(s, area, nonce, cp[:], 1, ref, sig)
}

// attackApprover: root asks the approver itself, with the agent's TLS key.
func (r *root) attackApprover(ctx context.Context) error {
	r.w.title("8. Root asks the approver itself")
	statement, _, err := r.honest(ctx)
	if err != nil {
		return err
	}
	nonce := make([]byte, attest.NonceTPMSize)
	nothing := func(*scope.Statement) {}
	for _, a := range []struct {
		name, rule string
		change     func(*scope.Statement)
		request    func(map[string]any)
	}{
		{"a digest instead of a statement", "form", nothing, func(q map[string]any) {
			delete(q, "statement")
			q["digest"] = make([]byte, 32)
		}},
		{"a digest beside another statement", "form", nothing, func(q map[string]any) { q["digest"] = make([]byte, 32) }},
		{"no nonce, to replay it anywhere", "form", nothing, func(q map[string]any) { q["nonce"] = []byte{} }},
		{"a negative expiration, for a ticket", "form", nothing, func(q map[string]any) { q["expiration"] = -3600 }},
		{"an order above the limit", "max_order_notional", func(st *scope.Statement) {
			d, _ := scope.ParseDecimal("4000") // a constant
			st.Order.OrderQty = &d
		}, nil},
		{"a notional that is not the order's", "statement", func(st *scope.Statement) {
			d, _ := scope.ParseDecimal("1")
			st.Decision.Notional.Amount = d
		}, nil},
		{"another agent's name", "statement", func(st *scope.Statement) { st.Agent += "x" }, nil},
		{"an order for tomorrow", "time", func(st *scope.Statement) {
			st.Time.Time = st.Time.Time.Add(24 * time.Hour)
			st.Expires += 24 * 3600
		}, nil},
		{"entries left out", "gap", func(st *scope.Statement) { st.Counter += 5 }, nil},
		{"a second order with an old number", "fork", func(st *scope.Statement) { st.Counter-- }, nil},
		{"an order that follows another record", "fork", func(st *scope.Statement) { st.Previous[0]++ }, nil},
		{"usage that is not true", "usage", func(st *scope.Statement) {
			st.Decision.Utilisation = append(st.Decision.Utilisation, scope.Utilisation{Limit: scope.RuleOrdersWindow, Window: scope.Window{RollingS: 60}, Used: "1", Of: "1000"})
		}, nil},
	} {
		if err := r.w.attack(a.name, "approver", a.rule, func() (bool, string, error) {
			st := statement
			if a.request == nil {
				var err error
				if st, err = r.forged(ctx, a.change); err != nil {
					return false, "", err
				}
			}
			q := r.request(st, nonce)
			if a.request != nil {
				a.request(q)
			}
			_, err := r.ask(q)
			return err == nil, fmt.Sprint(err), nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// elsewhere: other machines, other certificates, and an approver that is not
// on anybody's side.
func (r *root) elsewhere(ctx context.Context) error {
	w := r.w
	w.title("9. Other machines")
	thief, err := simulator.StartTPM(ctx, w.path("thief"))
	if err != nil {
		return err
	}
	defer func() { _ = thief.Kill() }() // it ends with this process anyway
	file, err := os.ReadFile(w.path("state", "mm-07", "action.tss2.pem"))
	if err != nil {
		return err
	}
	if err := w.attack("the key file, on another TPM", "TPM", "TPM_RC_INTEGRITY", func() (bool, string, error) {
		link, err := linuxudstpm.Open(thief.Address)
		if err != nil {
			return false, "", err
		}
		other := &root{w: w, link: link}
		defer other.end()
		_, err = other.load(file)
		return err == nil, code(err), nil
	}); err != nil {
		return err
	}
	// A compromised approver has its key and every record; it has not the TPM.
	if err := w.attack("a compromised approver alone", "TPM", "TPM_RC_INTEGRITY", func() (bool, string, error) {
		link, err := linuxudstpm.Open(thief.Address)
		if err != nil {
			return false, "", err
		}
		other := &root{w: w, link: link}
		defer other.end()
		if _, err := os.Stat(w.path("approver", "approver.key")); err != nil {
			return false, "", err // it has it
		}
		k, err := other.load(file) // even with the host's files
		if err == nil {
			err = other.sign(k, sha256.Sum256(nil), tpm2.PasswordAuth(nil))
		}
		return err == nil, code(err), nil
	}); err != nil {
		return err
	}
	// An approver with a certificate of its own making takes the place of the real one.
	return w.attack("another approver's TLS certificate", "signer", "no_approver", func() (bool, string, error) { return r.swapped(ctx) })
}

// swapped runs the signer against an approver whose TLS certificate is another one.
func (r *root) swapped(ctx context.Context) (bool, string, error) {
	w := r.w
	if _, err := w.run(ctx, "approver", "init", "--dir", w.path("impostor"), "--trust-domain", "example.org", "--ca", w.path("issuer", "ca.pem"), "--crl-url", "http://"+w.addresses.Public+"/crl",
		"--listen", "127.0.0.1:0", "--key", "file:"+w.path("approver", "approver.key"), "--agent", "mm-07"); err != nil {
		return false, "", err
	}
	var ready struct{ Signers string }
	impostor, err := w.startReady("impostor", &ready, "approver", "serve", "--config", w.path("impostor", "approver.yaml"))
	if err != nil {
		return false, "", err
	}
	defer impostor.stop()
	real := w.approverAt
	w.approverAt = []string{ready.Signers} // and the signer still pins approver/tls.pem
	if err := w.restartSigner(); err != nil {
		return false, "", err
	}
	accepted, said, err := w.signs(ctx, w.inkan, order(client.NewID()))
	w.approverAt = real
	return accepted, said, errors.Join(err, w.restartSigner())
}

// restartSigner starts the signer anew with the configuration as it should be now.
func (w *world) restartSigner() error {
	w.signer.stop()
	if err := w.signerConfig(map[string]string{"mm-07": w.inkan}); err != nil {
		return err
	}
	return w.startSigner()
}

// changed: the host is in another state, and root uses the old approval.
func (r *root) changed(ctx context.Context) error {
	statement, _, err := r.honest(ctx)
	if err != nil {
		return err
	}
	if err := r.tpmAttack("PCR changed, then the old approved policy", "TPM_RC_VALUE", func() error {
		s, _, err := r.asked(statement) // it is given: the approver knows of the change at the next renewal
		if err != nil {
			return err
		}
		if err := r.w.tpm.ExtendPCR(7, []byte("another Secure Boot policy")); err != nil {
			return err
		}
		return r.pcr(s, r.approved)
	}); err != nil {
		return err
	}
	return r.w.attack("the front door, on the changed host", "TPM", "PCR 7", func() (bool, string, error) {
		return r.w.signs(ctx, r.w.inkan, order(client.NewID()))
	})
}
