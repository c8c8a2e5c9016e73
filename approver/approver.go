// Package approver is the second check of an action, on another host than the
// agent's: [New] makes an [Approver], [Approver.Decide] answers a signer, and
// [Approver.Serve] serves signers over HTTPS.
//
// A TPM key in approver mode signs nothing without an authorization that names
// the exact TPM2_Sign command and the TPM session (TPM2_PolicySigned with
// cpHash). The approver makes one only for an action that it parsed and checked itself: it is handed the
// statement's bytes and the agent's certificate, never a digest, and computes
// from them what the TPM will be asked to sign. docs/approver.md has the rules.
package approver

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"inkan/attest"
	"inkan/internal/certext"
	"inkan/internal/jws"
	"inkan/internal/strictjson"
	"inkan/scope"
	"inkan/verify"
	"inkan/verify/source"
)

// Rules of the approver itself, beside those of scopes. docs/approver.md lists them.
const (
	RuleClient      scope.Rule = "client"              // the TLS client is not the agent of the statement
	RuleAgent       scope.Rule = "agent"               // the agent is not one that this approver answers
	RuleCertificate scope.Rule = "certificate"         // the certificate is malformed, not for actions, or not of this CA
	RuleKillState   scope.Rule = "kill_state_unknown"  // whether the issuer stopped the agent is not known freshly enough
	RuleRevoked     scope.Rule = "certificate_revoked" // it was revoked
	RuleRevocation  scope.Rule = "revocation_unknown"  // whether it was is not known freshly enough
	RuleMode        scope.Rule = "mode"                // the key is not one in approver mode in a TPM
	RuleKeyName     scope.Rule = "key_name"            // the certificate states another Name than its key and policy have
	RuleScopeWider  scope.Rule = "scope_wider"         // its scope is wider than the one that this approver has
	RuleStatement   scope.Rule = "statement"           // what is to be signed is not a permit statement of this certificate
	RuleTime        scope.Rule = "time"                // the statement is from the future, has expired, or lives for too long
	RuleUsage       scope.Rule = "usage"               // it states another use of its limits than its record leads to
	RuleGap         scope.Rule = "gap"                 // entries before it are missing
	RuleFork        scope.Rule = "fork"                // another statement has its number
	RuleChecked     scope.Rule = "unchecked"           // it was seen before, under a certificate that was not known then
	RuleRecord      scope.Rule = "record"              // this approver's record does not work
	RuleKey         scope.Rule = "key"                 // this approver's key does not work
	RuleReserve     scope.Rule = "reserve"             // this approver consents to no reserve of the agent
)

// Bounds of a request.
const (
	MaxRequest = 4 << 20 // bytes
	MaxEntries = 1024    // earlier entries
)

// Limits on time. A statement from further ahead than maxSkew is refused, and
// so is one that lives longer than maxLifetime.
const (
	maxSkew     = 2 * time.Second
	maxLifetime = 5 * time.Minute
)

// Request asks for an authorization, or hands over entries alone. Byte strings
// are standard base64.
type Request struct {
	Chain     [][]byte `json:"chain"`               // the action certificate and what is between it and the root, DER
	Nonce     []byte   `json:"nonce,omitempty"`     // nonceTPM of the session
	Statement []byte   `json:"statement,omitempty"` // the exact bytes that stand in the signer's record
	Entries   [][]byte `json:"entries,omitempty"`   // those before it that the approver has not seen, in order

	// From is the address that the request comes from, as the approver sees it; the
	// zero value where that is not known.
	From netip.Addr `json:"-"`
}

// ParseRequest reads a request, strictly: for an authorization, or one of
// entries alone.
func ParseRequest(b []byte, authorize bool) (*Request, error) {
	r, err := readRequest(b)
	if err != nil {
		return nil, err
	}
	switch {
	case !authorize && (len(r.Nonce) != 0 || len(r.Statement) != 0 || len(r.Entries) == 0):
		return nil, refuse(scope.RuleForm, "entries, and neither nonce nor statement, are expected")
	case authorize && len(r.Nonce) != attest.NonceTPMSize:
		return nil, r.badNonce()
	case authorize && len(r.Statement) == 0:
		return nil, refuse(scope.RuleForm, "statement is missing")
	case len(r.Entries) > MaxEntries:
		return nil, refuse(scope.RuleForm, "%d entries, at most %d are allowed at a time", len(r.Entries), MaxEntries)
	}
	return r, nil
}

// readRequest reads what requests of all kinds have.
func readRequest(b []byte) (*Request, error) {
	var r Request
	if err := strictjson.Unmarshal(b, MaxRequest, &r); err != nil {
		return nil, refuse(scope.RuleForm, "%v", err)
	}
	if len(r.Chain) == 0 || len(r.Chain) > 3 {
		return nil, refuse(scope.RuleForm, "chain has %d certificates, 1 to 3 are expected", len(r.Chain))
	}
	return &r, nil
}

func (r *Request) badNonce() error {
	return refuse(scope.RuleForm, "nonce has %d bytes, %d are expected", len(r.Nonce), attest.NonceTPMSize)
}

func refuse(rule scope.Rule, format string, a ...any) error {
	return &scope.Refusal{Rule: rule, Message: fmt.Sprintf(format, a...)}
}

// Approver decides on authorizations. It is safe for concurrent use.
type Approver struct {
	config     *Config
	key        crypto.Signer
	signing    *attest.ApproverKey // the same, used by Decide and Consent alone
	ref        []byte
	roots      *x509.CertPool
	revocation verify.Revocation
	kills      verify.Kills // nil: nobody is asked
	record     *Record
	log        *slog.Logger
	metrics    *metrics
	now        func() time.Time
	places     map[string]chan struct{} // for requests, by agent; "" is of all who are none

	mu    sync.RWMutex
	known map[[32]byte]*credential // by the SHA-256 of the chain
}

// maxKnown bounds the cache of certificates: one for each agent.
const maxKnown = 4096

// credential is what an action certificate says, verified but for time and revocation.
type credential struct {
	leaf, issuer *x509.Certificate
	until        time.Time // when the first certificate above the leaf ends
	action       *certext.ActionCertificate
	scope        *scope.Scope
	sum          scope.Digest // SHA-256 of the certificate
	name         []byte       // TPM Name of the key
	mode         string       // of the key
	header       *jws.Header
}

// New makes an approver. It does not close the record.
func New(c *Config, key crypto.Signer, roots *x509.CertPool, revocation verify.Revocation, record *Record, log *slog.Logger) (*Approver, error) {
	signing, err := attest.NewApproverKey(key)
	if err != nil {
		return nil, err
	}
	if revocation == nil {
		return nil, errors.New("approver: there is no way to know what was revoked")
	}
	var kills verify.Kills
	if c.Kills != "" {
		kills = &verify.KillList{Load: verify.HTTPLoader(c.Kills), MaxAge: c.maxKillAge}
	}
	places := map[string]chan struct{}{"": make(chan struct{}, atATime)}
	for agent := range c.agents {
		places[agent] = make(chan struct{}, atATime)
	}
	return &Approver{places: places, kills: kills, config: c, key: key, signing: signing, ref: attest.PolicyRef(c.TrustDomain), roots: roots, revocation: revocation, record: record, log: log, metrics: newMetrics(), now: time.Now,
		known: make(map[[32]byte]*credential)}, nil
}

// Decide authorizes one TPM2_Sign over the statement of a request, or says why
// not: then the error is a *scope.Refusal. client is the verified TLS certificate of who asks.
//
// The same statement may be authorized again, for another session: it is the
// same action with the same id.
func (a *Approver) Decide(ctx context.Context, client *x509.Certificate, r *Request) (*attest.Authorization, error) {
	now := a.now()

	// 1. The certificates: of the CA, in force, of one agent, of a key that needs this approver.
	cred, err := a.certified(ctx, client, r, attest.ModeApprover, now)
	if err != nil {
		return nil, err
	}

	// 2. The statement: strictly parsed, a permit, of this certificate, of now.
	st, err := cred.statement(r.Statement)
	if err != nil {
		return nil, err
	}
	if err := times(st, now); err != nil {
		return nil, err
	}

	if err := a.killed(ctx, cred, st, now); err != nil {
		return nil, err
	}

	// 3. The scope.
	permit, err := scope.Check(cred.scope, st.Action(), a.env(st, cred))
	if err != nil {
		return nil, err
	}
	if !st.StatesNotional(permit) {
		return nil, refuse(RuleStatement, "it states another notional than its order has")
	}

	// 4. The record: its place after all that was seen of this agent, and the
	// limits over time. When this returns, that it is authorized is on disk.
	entries, err := a.entries(ctx, r.Entries, client, cred, r.From, now)
	if err != nil {
		return nil, err
	}
	pending := a.authorization(cred, r)
	if err := a.recorded(ctx, a.record.authorize(ctx, cred, entries, &entry{bytes: r.Statement, st: st, permit: permit}, pending.begin)); err != nil {
		return nil, err // one that was begun is given to nobody
	}

	// 5. The authorization.
	x, err := pending.result()
	if err != nil {
		a.log.ErrorContext(ctx, "the approver's key does not sign", "error", err)
		return nil, refuse(RuleKey, "the approver's key does not sign; its log says why")
	}
	return x, nil
}

// pending is an authorization that is signed while its record is committed: the
// one takes a processor, the other a disk.
type pending struct {
	begin  func()
	result func() (*attest.Authorization, error)
}

// authorization prepares to sign one. The digest is of what the receiver will see, and
// the command is the one that signs it with the certified key: both are computed here.
func (a *Approver) authorization(cred *credential, r *Request) pending {
	sign := sync.OnceValues(func() (*attest.Authorization, error) {
		digest := sha256.Sum256(cred.header.SigningInput(r.Statement))
		return a.signing.Authorize(r.Nonce, attest.SignCommandHash(cred.name, digest), a.ref)
	})
	return pending{func() { go func() { _, _ = sign() }() }, sign} // what came of it, result says
}

// killed asks the issuer's list, where it is configured. Cancels pass.
func (a *Approver) killed(ctx context.Context, cred *credential, st *scope.Statement, now time.Time) error {
	if st.Kind.ReducesRisk() {
		return nil
	}
	return a.killedAt(ctx, cred, st.Audience, now)
}

func (a *Approver) killedAt(ctx context.Context, cred *credential, venue string, now time.Time) error {
	if a.kills == nil {
		return nil
	}
	err := a.kills.Check(ctx, cred.action.Agent, venue, cred.issuer, now)
	if errors.Is(err, &verify.Refusal{Reason: verify.ReasonKilled}) {
		return refuse(scope.RuleKill, "the issuer's list: %v", err)
	} else if err != nil {
		return &scope.Refusal{Rule: RuleKillState, Message: "this approver cannot tell now whether the agent was stopped; its log says why", Cause: err}
	}
	return nil
}

// env is what a statement's action is checked against.
func (a *Approver) env(st *scope.Statement, cred *credential) scope.Env {
	env := st.Env(cred.action.Attestation.Time)
	if !a.config.AcceptReference {
		env.Reference = nil
	}
	return env
}

// Append takes entries of an agent's record that the approver has not seen, and
// authorizes nothing.
func (a *Approver) Append(ctx context.Context, client *x509.Certificate, r *Request) error {
	now := a.now()
	cred, err := a.certified(ctx, client, r, attest.ModeApprover, now)
	if err != nil {
		return err
	}
	entries, err := a.entries(ctx, r.Entries, client, cred, r.From, now)
	if err != nil {
		return err
	}
	return a.recorded(ctx, a.record.authorize(ctx, cred, entries, nil, nil))
}

// recorded makes a refusal of a database's error, whose text is for the log alone.
func (a *Approver) recorded(ctx context.Context, err error) error {
	if _, refused := errors.AsType[*scope.Refusal](err); err == nil || refused {
		return err
	}
	a.metrics.recordErrors.Inc()
	a.log.ErrorContext(ctx, "the approver's record does not work", "error", err)
	return refuse(RuleRecord, "the approver's record does not work; its log says why")
}

// certified is the certificate that a request is under, of a key of a mode, in force now.
func (a *Approver) certified(ctx context.Context, client *x509.Certificate, r *Request, mode string, now time.Time) (*credential, error) {
	cred, err := a.credential(r.Chain, now)
	if err != nil {
		return nil, err
	}
	return cred, a.current(ctx, client, cred, mode, r.From, now)
}

// credential verifies a chain, or finds it verified.
func (a *Approver) credential(chain [][]byte, now time.Time) (*credential, error) {
	h := sha256.New()
	for _, der := range chain {
		sum := sha256.Sum256(der)
		h.Write(sum[:])
	}
	key := [32]byte(h.Sum(nil))
	a.mu.RLock()
	cred := a.known[key]
	a.mu.RUnlock()
	if cred != nil {
		return cred, nil
	}
	cred, err := a.verifyChain(chain, now)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.known) >= maxKnown {
		clear(a.known)
	}
	a.known[key] = cred
	return cred, nil
}

func (a *Approver) verifyChain(chain [][]byte, now time.Time) (*credential, error) {
	var list []*x509.Certificate
	pool := x509.NewCertPool()
	for i, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, refuse(RuleCertificate, "certificate %d of the chain: %v", i+1, err)
		}
		if list = append(list, c); i > 0 {
			pool.AddCert(c)
		}
	}
	leaf := list[0]
	cred := &credential{leaf: leaf, sum: sha256.Sum256(leaf.Raw)}
	var err error
	if cred.action, err = certext.ParseAction(leaf); err != nil {
		return nil, refuse(RuleCertificate, "%v", err)
	}
	verified, err := cred.action.VerifyChain(a.roots, pool, now)
	if err != nil {
		return nil, refuse(RuleCertificate, "it does not chain to the CA: %v", err)
	}
	// The header that is signed has the chain as it was sent, so that chain must
	// be the one that was verified and nothing else.
	if len(verified) != len(list)+1 {
		return nil, refuse(RuleCertificate, "the chain has certificates that do not belong to it")
	}
	for i, c := range list {
		if !c.Equal(verified[i]) {
			return nil, refuse(RuleCertificate, "the chain is not in order")
		}
	}
	cred.issuer, cred.until = verified[1], verified[1].NotAfter
	for _, c := range verified[2:] {
		if c.NotAfter.Before(cred.until) {
			cred.until = c.NotAfter
		}
	}
	if cred.scope, err = scope.ParseCanonical(cred.action.Scope); err != nil {
		return nil, refuse(RuleCertificate, "%v", err)
	}
	if err := cred.bind(); err != nil {
		return nil, err
	}
	if cred.header, err = jws.NewHeader("ES256", list, true); err != nil {
		return nil, refuse(RuleCertificate, "%v", err)
	}
	return cred, nil
}

// bind computes the key's TPM Name from what is certified and holds it against
// the Name that the certificate states.
func (c *credential) bind() error {
	att := c.action.Attestation
	if c.mode = att.Mode; c.mode != attest.ModeApprover && c.mode != attest.ModeReserve || att.Protection != certext.ProtectionTPM {
		return refuse(RuleMode, "the key is in mode %.16q with protection %.16q: only a key in a TPM in mode %s or %s needs an approver", att.Mode, att.Protection, attest.ModeApprover, attest.ModeReserve)
	}
	key, ok := c.leaf.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return refuse(RuleMode, "the key is not on P-256")
	}
	auth, err := hex.DecodeString(att.AuthPolicy)
	if err != nil || len(auth) != sha256.Size {
		return refuse(RuleKeyName, "the certificate's auth_policy is not a SHA-256")
	}
	if c.name, err = attest.ActionKeyName(key, auth); err != nil {
		return refuse(RuleKeyName, "%v", err)
	}
	stated, err := hex.DecodeString(att.KeyName)
	if err != nil || !bytes.Equal(stated, c.name) {
		return refuse(RuleKeyName, "the certificate states the key Name %.80s, its key and policy have %x", att.KeyName, c.name)
	}
	return nil
}

// current applies what may change between two requests, which are for keys of a mode.
func (a *Approver) current(ctx context.Context, client *x509.Certificate, cred *credential, mode string, from netip.Addr, now time.Time) error {
	leaf := cred.leaf
	switch {
	case cred.mode != mode:
		return refuse(RuleMode, "the key is in mode %s, one in mode %s is expected", cred.mode, mode)
	case now.Before(leaf.NotBefore):
		return refuse(RuleCertificate, "the certificate is valid from %s on", leaf.NotBefore.UTC().Format(time.RFC3339))
	case now.After(leaf.NotAfter):
		return &scope.Refusal{Rule: scope.RuleCertificateExpired, Message: "the certificate expired at " + leaf.NotAfter.UTC().Format(time.RFC3339)}
	case now.After(cred.until):
		return refuse(RuleCertificate, "a certificate that it chains to expired at %s", cred.until.UTC().Format(time.RFC3339))
	case client == nil || len(client.URIs) != 1 || client.URIs[0].String() != cred.action.Agent:
		return refuse(RuleClient, "the TLS client is not %s", cred.action.Agent)
	case now.Before(client.NotBefore) || now.After(client.NotAfter): // its connection may have been there before
		return refuse(RuleClient, "the TLS client's certificate is valid from %s to %s", client.NotBefore.UTC().Format(time.RFC3339), client.NotAfter.UTC().Format(time.RFC3339))
	}
	agent := a.config.agents[cred.action.Agent]
	if agent == nil {
		return refuse(RuleAgent, "%s is not one of this approver's agents", cred.action.Agent)
	}
	for _, c := range []*x509.Certificate{leaf, client} {
		if err := a.revocation.Check(ctx, c, cred.issuer, now); errors.Is(err, &verify.Refusal{Reason: verify.ReasonRevoked}) {
			return refuse(RuleRevoked, "%v", err)
		} else if err != nil {
			return &scope.Refusal{Rule: RuleRevocation, Message: "this approver cannot tell now whether the certificate was revoked; its log says why", Cause: err}
		}
	}
	if age := now.Sub(cred.action.Attestation.Time); age > a.config.maxAttestation || age < -time.Minute {
		return &scope.Refusal{Rule: scope.RuleAttestationAge, Value: age.Round(time.Second).String(), Limit: a.config.maxAttestation.String(),
			Message: fmt.Sprintf("the host was attested %s ago, at most %s is allowed", age.Round(time.Second), a.config.maxAttestation)}
	}
	if agent.ceiling != nil {
		if err := scope.Contains(agent.ceiling, cred.scope); err != nil {
			return refuse(RuleScopeWider, "the certificate's scope is wider than the one that this approver has: %v", err)
		}
	}
	return source.Check(cred.scope, from, a.config.regions)
}

// statement reads what is to be signed and ties it to the certificate.
func (c *credential) statement(b []byte) (*scope.Statement, error) {
	st, err := scope.ParseStatement(b)
	if err != nil {
		return nil, refuse(RuleStatement, "%v", err)
	}
	att := c.action.Attestation
	switch {
	case st.Decision.Decision != scope.DecisionPermit:
		return nil, refuse(RuleStatement, "it is a denial")
	case st.Decision.Certificate != c.sum:
		return nil, refuse(RuleStatement, "it names another certificate")
	case [32]byte(st.Decision.Scope) != c.scope.Hash():
		return nil, refuse(RuleStatement, "it names another scope than its certificate has")
	case st.Agent != c.action.Agent:
		return nil, refuse(RuleStatement, "it is of %.200s, the certificate of %s", st.Agent, c.action.Agent)
	case st.Issuer != c.leaf.Issuer.String():
		return nil, refuse(RuleStatement, "it names another issuer than its certificate has")
	case st.Attestation.Evidence != att.EvidenceSHA256 || !st.Attestation.Time.Time.Equal(att.Time):
		return nil, refuse(RuleStatement, "it names other evidence than its certificate does")
	}
	return st, nil
}

func times(st *scope.Statement, now time.Time) error {
	expires := time.Unix(st.Expires, 0)
	switch {
	case st.Time.Time.After(now.Add(maxSkew)):
		return refuse(RuleTime, "the statement is from %s, which is later than this approver's clock", st.Time.Time.Format(scope.TimeFormat))
	case now.After(expires):
		return refuse(RuleTime, "the statement expired at %s", expires.UTC().Format(time.RFC3339))
	case expires.Sub(st.Time.Time) > maxLifetime:
		return refuse(RuleTime, "the statement lives for %s, at most %s is allowed", expires.Sub(st.Time.Time).Round(time.Second), maxLifetime)
	}
	return nil
}
