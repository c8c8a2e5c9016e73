// Package verify is what a venue runs: [NewReceiver] makes a [Receiver],
// [Receiver.Verify] accepts a signed action or says why not, and
// [Receiver.Middleware] does so for HTTP requests. It opens no device and
// needs no cgo.
//
// Checks, order and reasons are those of docs/protocol.md.
package verify

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"inkan/internal/certext"
	"inkan/internal/jws"
	"inkan/scope"
	"inkan/verify/source"
)

// Config says whom a receiver trusts and how fresh things must be.
type Config struct {
	Audiences         []string       // who this receiver is: MICs, or lei: and an LEI
	Roots             *x509.CertPool // the CA
	Revocation        Revocation     // must be set; NoRevocation says that it is not wanted
	Replay            ReplayStore    // must be set
	MaxSkew           time.Duration  // between this clock and the signer's; 2 s by default
	MaxLifetime       time.Duration  // of an action; 5 min by default
	MaxAttestationAge time.Duration  // 24 h by default
	// References gives this receiver's own reference price of an instrument. Where it
	// is nil the statement's counts only if AcceptReference is set: then the signer is
	// believed about the price that its collar was checked against.
	References      func(instrument string) *scope.ReferencePrice
	AcceptReference bool
	// Policies finds the policies under which actions were decided; without it such
	// actions are refused. NoPolicies says that they are not looked at.
	Policies Policies
	// Kills says which agents are stopped; without it nobody is asked. See KillList.
	Kills Kills
	// Messages says which HTTP requests Middleware takes, and compares them with their
	// actions; without it that is the caller's to do. See package verify/message.
	Messages Messages
	// Regions says where addresses are, for scopes with source_regions; without it
	// those are refused. See source.Open.
	Regions source.Regions
	// Forwarding says which proxies stand before Middleware; without it the TCP peer
	// is where a request comes from.
	Forwarding *source.Forwarding
	// RequestSignature is what Middleware wants of requests' own signatures; without it
	// they are not looked at.
	RequestSignature *RequestSignature
	// Refused, if not nil, is told of each request that Middleware refuses: a *[Refusal] with
	// its cause, which the client does not see, or an error that the client is told nothing of.
	Refused func(req *http.Request, err error)
	Now     func() time.Time // time.Now by default
}

// Receiver verifies signed actions. It is safe for concurrent use.
type Receiver struct {
	c     Config
	mu    sync.RWMutex
	known map[string]*credential // by encoded header, once it was verified

	narrowed narrowings
}

// maxKnown bounds the cache of verified headers: one for each live certificate.
const maxKnown = 4096

// algorithms are those of RFC 7518 and RFC 8037 that a device's key may have.
var algorithms = []string{"ES256", "ES384", "PS256", "RS256", "EdDSA"}

// credential is all that a protected header says, verified but for time and
// revocation.
type credential struct {
	action *certext.ActionCertificate
	scope  *scope.Scope
	alg    string
	sum    scope.Digest // SHA-256 of the certificate
	issuer *x509.Certificate
}

// NewReceiver checks a configuration and makes a receiver of it.
func NewReceiver(c Config) (*Receiver, error) {
	switch {
	case len(c.Audiences) == 0:
		return nil, errors.New("receiver: Audiences is empty: it would accept nothing")
	case c.Roots == nil:
		return nil, errors.New("receiver: Roots is missing")
	case c.Revocation == nil:
		return nil, errors.New("receiver: Revocation is missing: use NoRevocation to go without")
	case c.Replay == nil:
		return nil, errors.New("receiver: Replay is missing")
	}
	for _, d := range []struct {
		d        *time.Duration
		standard time.Duration
	}{{&c.MaxSkew, 2 * time.Second}, {&c.MaxLifetime, 5 * time.Minute}, {&c.MaxAttestationAge, 24 * time.Hour}} {
		if *d.d < 0 {
			return nil, errors.New("receiver: a duration is negative")
		}
		if *d.d == 0 {
			*d.d = d.standard
		}
	}
	if c.RequestSignature != nil && c.RequestSignature.Key == nil {
		return nil, errors.New("receiver: RequestSignature.Key is missing: PeerKey takes that of the TLS client certificate")
	}
	if err := c.Forwarding.Validate(); err != nil {
		return nil, fmt.Errorf("receiver: %w", err)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Receiver{c: c, known: make(map[string]*credential)}, nil
}

// Verified is an action that a receiver accepted.
type Verified struct {
	Agent       string            // SPIFFE ID
	Certificate *x509.Certificate // of the agent's action key
	Scope       *scope.Scope
	Statement   *scope.Statement
	Action      *scope.Action
}

// Body is the native message that arrived with an action.
type Body struct {
	Format string // scope.NativeHTTPBody and so on
	SHA256 [32]byte
}

// Arrival is what a receiver sees beside a signed action.
type Arrival struct {
	Body *Body      // the native message that arrived with it; nil: there is none
	From netip.Addr // where it comes from; the zero value: not known, so a scope that names places refuses it
	// Agent is whose the request is, as it was proven otherwise: a SPIFFE ID. An action of
	// another agent is refused. Empty: not known.
	Agent string
	// Agrees says why the message that arrived says something else than the action
	// (check 10); nil if it does not. It gets an action whose signature verified, and what it
	// says is told to who sent the message. A nil Agrees leaves that check to the caller.
	Agrees func(*scope.Action) error
}

// Verify is [Receiver.VerifyArrival] of an action that comes from an address
// that is not known.
func (r *Receiver) Verify(ctx context.Context, compact []byte, body *Body) (*Verified, error) {
	return r.VerifyArrival(ctx, compact, Arrival{Body: body})
}

// VerifyArrival accepts a JWS in compact serialisation, or says why not; then
// the error is a *[Refusal]. An accepted action is remembered, and not accepted again.
func (r *Receiver) VerifyArrival(ctx context.Context, compact []byte, arrived Arrival) (*Verified, error) {
	now := r.c.Now()

	// 1. Size and form.
	m, err := jws.Split(compact)
	if err != nil {
		return nil, refuse(ReasonForm, "%v", err)
	}

	// 2. Header, 3. certificate: verified once for each header.
	cred, err := r.credential(m, now)
	if err != nil {
		return nil, err
	}
	crt := cred.action.Certificate
	if now.Before(crt.NotBefore.Add(-r.c.MaxSkew)) || now.After(crt.NotAfter) {
		return nil, refuse(ReasonExpired, "the certificate is valid from %s to %s", crt.NotBefore.UTC().Format(time.RFC3339), crt.NotAfter.UTC().Format(time.RFC3339))
	}

	// 4. Revocation, fail closed.
	if err := r.c.Revocation.Check(ctx, crt, cred.issuer, now); err != nil {
		if refusal, ok := errors.AsType[*Refusal](err); ok {
			return nil, refusal
		}
		return nil, own(ReasonRevocation, err)
	}

	// 5. Signature over the exact bytes; only then are they read.
	if err := jws.Verify(crt.PublicKey, cred.alg, m.SigningInput, m.Signature); err != nil {
		return nil, refuse(ReasonSignature, "%v", err)
	}
	r.remember(m.EncodedHeader, cred, now)
	st, err := cred.statement(m.Payload)
	if err != nil {
		return nil, err
	}

	if arrived.Agent != "" && arrived.Agent != st.Agent {
		return nil, refuse(ReasonRequestSignature, "the request was signed by %s, the action is of %s", arrived.Agent, st.Agent)
	}

	// 6. Audience.
	if !slices.Contains(r.c.Audiences, st.Audience) {
		return nil, refuse(ReasonAudience, "the action is for %s", st.Audience)
	}
	// 7. Times.
	if err := r.times(st, now); err != nil {
		return nil, err
	}
	// 17., 9. to 12., 14. and 15. come before 8. and 13., so that a message that is refused does not use the action up.
	if err := r.comesFrom(cred.scope, arrived.From); err != nil {
		return nil, err
	}
	if err := checkBody(st, arrived.Body); err != nil {
		return nil, err
	}
	if arrived.Agrees != nil {
		if err := arrived.Agrees(st.Action()); err != nil {
			if refusal, ok := errors.AsType[*Refusal](err); ok {
				return nil, refusal
			}
			return nil, refuse(ReasonMismatch, "%v", err)
		}
	}
	if [32]byte(st.Decision.Scope) != cred.scope.Hash() {
		return nil, refuse(ReasonPolicy, "the action was decided under the scope %x, the certificate has %x", st.Decision.Scope, cred.scope.Hash())
	}
	if age := now.Sub(cred.action.Attestation.Time); age > r.c.MaxAttestationAge {
		return nil, refuse(ReasonAttestation, "the host was attested %s ago, at most %s are accepted", age.Round(time.Second), r.c.MaxAttestationAge)
	}
	action := st.Action()
	env := st.Env(cred.action.Attestation.Time)
	env.Reference = r.reference(st, action)
	permit, err := scope.Check(cred.scope, action, env)
	if err != nil {
		return nil, refuse(ReasonScope, "%v", err)
	}
	if !st.StatesNotional(permit) {
		return nil, refuse(ReasonScope, "the statement states another notional than its order has")
	}
	if err := r.policy(ctx, cred, st, env); err != nil {
		return nil, err
	}
	if err := r.killed(ctx, cred, st, now); err != nil {
		return nil, err
	}

	// 8. Seen before, 13. limits over time, 16. kept: one step of the store.
	use := Use{Key: cred.sum, ID: st.ID, Counter: uint64(st.Counter), Signed: st.Time.Time, Until: time.Unix(st.Expires, 0).Add(r.c.MaxSkew), Skew: r.c.MaxSkew, Agent: cred.action.Agent,
		Statement: st, Permit: permit, Header: m.EncodedHeader, Payload: m.Payload, Signature: m.Signature}
	if err := r.c.Replay.Use(ctx, use, now); err != nil {
		if refusal, ok := errors.AsType[*Refusal](err); ok {
			return nil, refusal
		}
		return nil, own(ReasonStore, err)
	}
	return &Verified{Agent: cred.action.Agent, Certificate: crt, Scope: cred.scope, Statement: st, Action: action}, nil
}

// credential verifies a protected header, or finds it verified.
func (r *Receiver) credential(m *jws.Message, now time.Time) (*credential, error) {
	r.mu.RLock()
	cred := r.known[m.EncodedHeader]
	r.mu.RUnlock()
	if cred != nil {
		return cred, nil
	}
	return r.verifyHeader(m, now)
}

// remember keeps a verified header. It is called once a signature with its key was
// verified: whoever has seen an action could else make headers of its certificate, with
// other certificates beside it, and fill the memory with them.
func (r *Receiver) remember(header string, cred *credential, now time.Time) {
	r.mu.RLock()
	known := r.known[header] == cred
	r.mu.RUnlock()
	if known {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.known) >= maxKnown {
		for h, c := range r.known {
			if now.After(c.action.Certificate.NotAfter) {
				delete(r.known, h)
			}
		}
		if len(r.known) >= maxKnown {
			clear(r.known)
		}
	}
	r.known[header] = cred
}

func (r *Receiver) verifyHeader(m *jws.Message, now time.Time) (*credential, error) {
	h, err := m.Header()
	if err != nil {
		return nil, refuse(ReasonHeader, "%v", err)
	}
	if h.Typ != jws.Type {
		return nil, refuse(ReasonHeader, "typ is %.48q, %s is expected", h.Typ, jws.Type)
	}
	if !slices.Contains(algorithms, h.Alg) {
		return nil, refuse(ReasonHeader, "alg is %.16q, one of %v is expected", h.Alg, algorithms)
	}
	if len(h.X5C) == 0 || len(h.X5C) > 4 {
		return nil, refuse(ReasonCertificate, "x5c has %d certificates, 1 to 4 are expected", len(h.X5C))
	}
	var chain []*x509.Certificate
	for _, text := range h.X5C {
		der, err := base64.StdEncoding.Strict().DecodeString(text)
		if err != nil || strings.ContainsAny(text, "\r\n") { // the decoder skips line ends
			return nil, refuse(ReasonCertificate, "x5c is not base64 in its one spelling")
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, refuse(ReasonCertificate, "x5c: %v", err)
		}
		chain = append(chain, c)
	}
	leaf := chain[0]
	sum := sha256.Sum256(leaf.Raw)
	if h.X5TS256 != base64.RawURLEncoding.EncodeToString(sum[:]) {
		return nil, refuse(ReasonHeader, "x5t#S256 does not name the first certificate of x5c")
	}
	cred := &credential{sum: sum, alg: h.Alg}
	alg, _, err := jws.Algorithm(leaf.PublicKey)
	if err != nil || h.Alg != alg && !(alg == "PS256" && h.Alg == "RS256") {
		return nil, refuse(ReasonHeader, "alg is %.16q, the certificate's key has %q", h.Alg, alg)
	}
	if cred.action, err = certext.ParseAction(leaf); err != nil {
		return nil, refuse(ReasonCertificate, "%v", err)
	}
	if cred.scope, err = scope.ParseCanonical(cred.action.Scope); err != nil {
		return nil, refuse(ReasonCertificate, "%v", err)
	}
	intermediates := x509.NewCertPool()
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	// Its own times are checked at each use; here the chain as of its life.
	at := now
	if at.After(leaf.NotAfter) {
		at = leaf.NotAfter
	} else if at.Before(leaf.NotBefore) {
		at = leaf.NotBefore
	}
	verified, err := cred.action.VerifyChain(r.c.Roots, intermediates, at)
	if err != nil {
		return nil, refuse(ReasonCertificate, "it does not chain to the CA: %v", err)
	}
	cred.issuer = verified[1]
	return cred, nil
}

// statement reads what was signed and ties it to the certificate.
func (c *credential) statement(payload []byte) (*scope.Statement, error) {
	st, err := scope.ParseStatement(payload)
	switch {
	case err != nil:
		return nil, refuse(ReasonStatement, "%v", err)
	case st.Decision.Decision != scope.DecisionPermit:
		return nil, refuse(ReasonStatement, "the statement is a denial")
	case st.Decision.Certificate != c.sum:
		return nil, refuse(ReasonStatement, "the statement names another certificate")
	case st.Agent != c.action.Agent:
		return nil, refuse(ReasonStatement, "the statement is of %s, the certificate of %s", st.Agent, c.action.Agent)
	}
	return st, nil
}

func (r *Receiver) times(st *scope.Statement, now time.Time) error {
	expires := time.Unix(st.Expires, 0)
	switch {
	case st.Time.Time.After(now.Add(r.c.MaxSkew)):
		return refuse(ReasonFuture, "the action is from %s", st.Time.Time.Format(scope.TimeFormat))
	case now.After(expires.Add(r.c.MaxSkew)):
		return refuse(ReasonStale, "the action expired at %s", expires.UTC().Format(time.RFC3339))
	case expires.Sub(st.Time.Time) > r.c.MaxLifetime:
		return refuse(ReasonStale, "the action lives for %s, at most %s is accepted", expires.Sub(st.Time.Time).Round(time.Second), r.c.MaxLifetime)
	}
	return nil
}

// comesFrom: who calls from elsewhere is not the agent, whatever it has of the agent's.
func (r *Receiver) comesFrom(s *scope.Scope, from netip.Addr) error {
	err := source.Check(s, from, r.c.Regions)
	if refusal, ok := errors.AsType[*scope.Refusal](err); ok {
		reason := ReasonSourceNetwork
		if refusal.Rule == scope.RuleSourceRegion {
			reason = ReasonSourceRegion
		}
		return &Refusal{Reason: reason, Detail: refusal.Message, Cause: refusal.Cause}
	}
	return err
}

// checkBody: what arrived is what was signed for; neither stands alone.
func checkBody(st *scope.Statement, body *Body) error {
	switch {
	case body == nil && st.Native == nil:
		return nil
	case body == nil:
		return refuse(ReasonBody, "the action was signed for a native message, and none arrived")
	case st.Native == nil:
		return refuse(ReasonBody, "a native message arrived that the action does not name")
	}
	want, err := hex.DecodeString(st.Native.SHA256)
	if err != nil || st.Native.Format != body.Format || subtle.ConstantTimeCompare(want, body.SHA256[:]) != 1 {
		return refuse(ReasonBody, "the native message that arrived is not the one that was signed for")
	}
	return nil
}

func (r *Receiver) reference(st *scope.Statement, a *scope.Action) *scope.ReferencePrice {
	if r.c.References != nil {
		return r.c.References(a.Instrument())
	}
	if r.c.AcceptReference {
		return st.ReferencePrice()
	}
	return nil
}
