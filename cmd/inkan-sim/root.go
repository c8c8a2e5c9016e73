package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
		switch p.Mode() {
		case attest.ModeApprover:
			r.approved = p
		case attest.ModeLocal:
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

// pcr is TPM2_PolicyPCR, and TPM2_PolicyNV where the approval ends with an epoch.
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
	if err != nil || p.Epoch == 0 {
		return err
	}
	counter := tpm2.TPM2BName{Buffer: attest.EpochName()}
	_, err = tpm2.PolicyNV{AuthHandle: tpm2.AuthHandle{Handle: attest.EpochIndex, Name: counter, Auth: tpm2.PasswordAuth(nil)}, NVIndex: tpm2.NamedHandle{Handle: attest.EpochIndex, Name: counter}, PolicySession: s.Handle(),
		OperandB: tpm2.TPM2BOperand{Buffer: attest.EpochOperand(p.Epoch)}, Operation: tpm2.TPMEOUnsignedLE}.Execute(r.link)
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
	ref := p.PolicyRef(r.policies.Ref)
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
	return r.askAt("/v1/authorizations", request)
}

func (r *root) askAt(path string, request map[string]any) (*attest.Authorization, error) {
	b, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	res, err := r.http.Post("https://"+r.w.approverAt[0]+path, "application/json", bytes.NewReader(b))
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
