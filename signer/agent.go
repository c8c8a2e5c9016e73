package signer

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"inkan/approver/client"
	"inkan/audit"
	"inkan/internal/certext"
	"inkan/internal/clock"
	"inkan/internal/jws"
	"inkan/scope"
)

// Rules of the signer itself, beside those of scopes. docs/signer.md lists them.
const (
	RuleCaller        scope.Rule = "caller"         // the process is not one that may act as an agent
	RuleNoCertificate scope.Rule = "no_certificate" // the agent has none yet
	RuleDevice        scope.Rule = "device"         // the device does not sign, for instance since the host is not in an approved state
	RuleApprover      scope.Rule = "approver"       // an approver refuses
	RuleNoApprover    scope.Rule = "no_approver"    // no approver gave an authorization in time
	RuleUnsigned      scope.Rule = "unsigned"       // recorded before, under another certificate, and never signed
)

// Agent is one agent that the signer serves: its key, certificate and record.
// It is safe for concurrent use.
type Agent struct {
	name      string
	key       crypto.Signer // used by sign, through the credential, and by Checkpoint alone
	approvers *client.Group // for a key in approver mode
	log       *audit.Log
	lifetime  time.Duration
	prices    *priceFile
	busy      chan struct{}
	current   atomic.Pointer[credential]
	cancels   *CancelCredentials         // nil: cancels are signed as all else is
	cancel    atomic.Pointer[credential] // of them; nil: there is none
	reserves  *ReserveCredentials        // nil: there is no reserve
	reserve   atomic.Pointer[credential] // of it; nil: there is none
	sealing   sync.Mutex                 // one checkpoint at a time
	every     time.Duration              // between checkpoints
	now       func() time.Time
	metrics   *agentMetrics
	device    func() DeviceStatus // nil: not known
	testify   func() error        // nil: the device cannot
	logger    *slog.Logger

	policy      string                // file; empty: policies come from operators alone
	policyError atomic.Pointer[error] // why the file was not taken over

	clock         *clock.Watch
	maxDivergence uint64 // microseconds; 0: no bound but the scope's
}

// credential is a certificate and all that is derived from it once.
type credential struct {
	key      crypto.Signer
	chain    []*x509.Certificate
	action   *certext.ActionCertificate
	scope    *scope.Scope
	alg      string
	header   *jws.Header
	identity audit.Identity
}

func newCredential(chain []*x509.Certificate, key crypto.Signer, lifetime time.Duration) (*credential, error) {
	if len(chain) == 0 {
		return nil, errors.New("no certificate")
	}
	leaf := chain[0]
	if k, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !k.Equal(leaf.PublicKey) {
		return nil, errors.New("the certificate is not for the agent's key")
	}
	c := &credential{key: key, chain: chain}
	var err error
	if c.action, err = certext.ParseAction(leaf); err != nil {
		return nil, fmt.Errorf("the certificate: %w", err)
	}
	if c.scope, err = scope.ParseCanonical(c.action.Scope); err != nil {
		return nil, fmt.Errorf("the certificate: %w", err)
	}
	if c.alg, _, err = jws.Algorithm(leaf.PublicKey); err != nil {
		return nil, err
	}
	if c.header, err = jws.NewHeader(c.alg, chain, true); err != nil {
		return nil, err
	}
	c.identity = audit.Identity{
		Issuer: leaf.Issuer.String(), Agent: c.action.Agent, Certificate: sha256.Sum256(leaf.Raw), Scope: c.scope.Hash(),
		Evidence: c.action.Attestation.EvidenceSHA256, AttestedAt: c.action.Attestation.Time, Lifetime: lifetime, NotAfter: leaf.NotAfter,
	}
	return c, nil
}

// refuses says why nothing is signed under the certificate at a time. What is from
// outside of its life would make the whole record one that does not verify.
func (c *credential) refuses(at time.Time) *scope.Refusal {
	from, end := c.chain[0].NotBefore.UTC(), c.chain[0].NotAfter.UTC()
	switch {
	case at.Before(from):
		return &scope.Refusal{Rule: RuleNoCertificate, Limit: from.Format(time.RFC3339), Value: at.UTC().Format(time.RFC3339),
			Message: fmt.Sprintf("the agent's certificate is valid from %s on, and here it is %s: see that the clock is right", from.Format(time.RFC3339), at.UTC().Format(time.RFC3339))}
	case at.After(end):
		return &scope.Refusal{Rule: scope.RuleCertificateExpired, Limit: end.Format(time.RFC3339),
			Message: "the agent's certificate expired at " + end.Format(time.RFC3339) + ": see the signer's log for why it was not renewed"}
	}
	return nil
}

// SetChain replaces the agent's certificate, leaf first, without interrupting
// what is being signed. The certificate stands in the record before it is used.
func (a *Agent) SetChain(ctx context.Context, chain []*x509.Certificate) error {
	c, err := newCredential(chain, a.key, a.lifetime)
	if err != nil {
		return fmt.Errorf("agent %s: %w", a.name, err)
	}
	if err := a.log.AddCertificate(ctx, chain); err != nil {
		return err
	}
	a.current.Store(c)
	a.settle(ctx)
	a.metrics.notAfter.Set(float64(chain[0].NotAfter.Unix()))
	return nil
}

// setOtherChains takes the certificates of the keys beside the action key.
func (a *Agent) setOtherChains(ctx context.Context) error {
	return errors.Join(a.setCancelChain(ctx), a.setReserveChain(ctx))
}

// setCancelChain takes the certificate of the key for cancels. One that allows
// anything else is refused: that key needs no approver.
func (a *Agent) setCancelChain(ctx context.Context) error {
	if a.cancels == nil {
		return nil
	}
	chain, err := a.cancels.Chain()
	if err != nil {
		return fmt.Errorf("agent %s: cancels: %w", a.name, err)
	}
	c, err := newCredential(chain, a.cancels.Key, a.lifetime)
	if err != nil {
		return fmt.Errorf("agent %s: cancels: %w", a.name, err)
	}
	only, err := c.scope.CancelsOnly()
	if err != nil {
		return fmt.Errorf("agent %s: cancels: %w", a.name, err)
	}
	if only.Hash() != c.scope.Hash() {
		return fmt.Errorf("agent %s: the certificate for cancels allows more than cancels", a.name)
	}
	if err := a.log.AddCertificate(ctx, chain); err != nil {
		return err
	}
	a.cancel.Store(c)
	return nil
}

// Signed is a signed action.
type Signed struct {
	ID      string `json:"id"`
	Counter uint64 `json:"counter"`
	JWS     string `json:"jws"`
}

// Act has an action signed, if the agent's scope allows it. Step 1, who asks,
// is the server's; run says how that process was started, nil where it is not
// confined, and authorizations are what controllers signed for the action. A
// refusal is a *scope.Refusal, and stands in the record.
func (a *Agent) Act(ctx context.Context, body []byte, run *scope.Run, authorizations []string) (*Signed, error) {
	cred := a.current.Load()
	if cred == nil {
		return nil, &scope.Refusal{Rule: RuleNoCertificate, Message: "the agent has no certificate yet: see the signer's log"}
	}

	if a.log.Finding() != nil {
		a.settle(ctx)
	}

	// 2. Parse: what is checked is what is signed.
	action, err := scope.ParseAction(body)
	if err != nil {
		return nil, a.refuse(ctx, nil, err, cred, run)
	}

	if c := a.cancel.Load(); c != nil && action.IsCancel() {
		cred = c // its own key, which no approver stands before
	} else if a.onReserve() {
		cred = a.reserve.Load() // no approver answers
	}

	// 3. Check the scope that the certificate has.
	now := a.now().UTC().Truncate(time.Microsecond)
	if r := cred.refuses(now); r != nil {
		return nil, a.refuse(ctx, action, r, cred, run)
	}
	env := scope.Env{Now: now, AttestedAt: cred.action.Attestation.Time, Run: run, Agent: cred.action.Agent, Authorizations: authorizations}
	var refusal *scope.Refusal
	if env.Clock, refusal = a.clockRefuses(action); refusal != nil {
		return nil, a.refuse(ctx, action, refusal, cred, run)
	}
	if env.Reference, err = a.prices.find(cred.scope, action); err != nil {
		return nil, a.refuse(ctx, action, &scope.Refusal{Rule: scope.RuleReferenceMissing, Message: err.Error()}, cred, run)
	}
	permit, err := scope.Check(cred.scope, action, env)
	if err != nil {
		return nil, a.refuse(ctx, action, err, cred, run)
	}

	// 4. Record: durable before anything is signed.
	receipt, err := a.log.Record(ctx, permit, cred.identity)
	if err != nil {
		return nil, err
	}
	if jws := receipt.Signed(); jws != "" {
		return &Signed{receipt.ID(), receipt.Counter(), jws}, nil
	}

	// 5. and 6. Sign the statement, verify, keep, answer.
	compact, err := a.sign(ctx, cred, receipt)
	if err != nil {
		return nil, err
	}
	if err := a.log.Complete(receipt, compact); err != nil {
		return nil, err
	}
	a.metrics.signed.Inc()
	if cred.action.Attestation.Mode == certext.ModeReserve {
		a.metrics.reserveSigned.Inc()
	}
	return &Signed{receipt.ID(), receipt.Counter(), compact}, nil
}

// sign is the only use of the key: it signs the statement of an unspent
// receipt, and releases no signature that does not verify.
func (a *Agent) sign(ctx context.Context, cred *credential, receipt *audit.Receipt) (string, error) {
	statement, err := receipt.Spend()
	if err != nil {
		return "", err
	}
	if receipt.Repeated() {
		// It may have been recorded under a certificate that was replaced since.
		st, err := scope.ParseStatement(statement)
		if err != nil {
			return "", err
		}
		if [32]byte(st.Decision.Certificate) != cred.identity.Certificate {
			return "", &scope.Refusal{Rule: RuleUnsigned, Message: "the action was recorded under an earlier certificate and not signed: send it with a new id"}
		}
	}
	input := cred.header.SigningInput(statement)
	var opts crypto.SignerOpts
	if cred.action.Attestation.Mode == certext.ModeApprover {
		opts = &authorization{ctx, a, &client.Proposal{Chain: cred.chain, Statement: statement, Counter: receipt.Counter(), Entries: a.log.Statements}}
	}
	begun := time.Now()
	signature, err := jws.SignWith(cred.key, input, opts)
	a.metrics.device.Observe(time.Since(begun).Seconds())
	if r, ok := errors.AsType[*client.Refused](err); ok {
		a.logger.Warn("an approver refuses", "agent", a.name, "counter", receipt.Counter(), "error", err)
		p := r.Problem
		return "", &scope.Refusal{Rule: RuleApprover, Field: p.Field, Value: p.Value, Limit: p.Limit, Excess: p.Excess, Message: "recorded, but not signed: an approver refuses: " + p.Error()}
	}
	if errors.Is(err, client.ErrUnreachable) {
		a.logger.Error("no approver gave an authorization", "agent", a.name, "counter", receipt.Counter(), "error", err)
		message := "recorded, but not signed: no approver gave an authorization; the signer's log says why. Send the same action again"
		if a.onReserve() {
			message += ", or with a new id: then the reserve's key signs it, if it is in the reserve's scope"
		}
		return "", &scope.Refusal{Rule: RuleNoApprover, Message: message, Cause: err}
	}
	if err != nil {
		a.logger.Error("the device did not sign", "agent", a.name, "error", err)
		return "", &scope.Refusal{Rule: RuleDevice, Message: "recorded, but the device did not sign; the signer's log says why. Send the same action again", Cause: err}
	}
	if _, done := cred.key.(interface{ VerifiesSignatures() }); done {
		// With the certificate's key: newCredential has compared them.
	} else if err := jws.Verify(cred.chain[0].PublicKey, cred.alg, input, signature); err != nil {
		a.logger.Error("the device's signature is wrong", "agent", a.name, "error", err)
		return "", &scope.Refusal{Rule: RuleDevice, Message: "recorded, but the device's signature does not verify"}
	}
	return jws.Compact(input, signature), nil
}

// authorization is what a device in approver mode asks for an authorization of
// a recorded statement: the options of its Sign.
type authorization struct {
	ctx      context.Context
	agent    *Agent
	proposal *client.Proposal
}

// HashFunc implements crypto.SignerOpts.
func (*authorization) HashFunc() crypto.Hash { return crypto.SHA256 }

// Authorize asks the approvers for the device's session.
func (x *authorization) Authorize(nonce []byte, accept func(approver string, expiration int32, signature []byte) (bool, error)) error {
	if x.agent.approvers == nil {
		return fmt.Errorf("%w: none is configured", client.ErrUnreachable)
	}
	p := *x.proposal
	p.Nonce = nonce
	begun := time.Now()
	defer func() { x.agent.metrics.approver.Observe(time.Since(begun).Seconds()) }()
	return x.agent.approvers.Authorize(x.ctx, &p, accept)
}

// refuse records a refusal and returns it. If it cannot be recorded, that is
// the error: the answer is no in any case.
func (a *Agent) refuse(ctx context.Context, action *scope.Action, cause error, cred *credential, run *scope.Run) error {
	r, ok := errors.AsType[*scope.Refusal](cause)
	if !ok {
		return cause
	}
	a.metrics.refused.WithLabelValues(a.name, string(r.Rule)).Inc()
	id := cred.identity
	id.Run = run
	id.Clock, _, _ = a.clock.Now()
	if err := a.log.Refuse(ctx, action, r, id); err != nil {
		return err
	}
	return r
}
