package approver

import (
	"context"
	"crypto/x509"
	"errors"
	"time"

	"inkan/attest"
	"inkan/internal/postgres"
	"inkan/scope"
)

// ParseConsentRequest reads a request for a consent, strictly: the chain of the
// reserve's certificate and a session's nonce alone.
func ParseConsentRequest(b []byte) (*Request, error) {
	r, err := readRequest(b)
	if err != nil {
		return nil, err
	}
	switch {
	case len(r.Nonce) != attest.NonceTPMSize:
		return nil, r.badNonce()
	case len(r.Statement) != 0 || len(r.Entries) != 0:
		return nil, refuse(scope.RuleForm, "chain and nonce alone are expected")
	}
	return r, nil
}

// Consent consents, for a time, to whatever an agent's key in reserve mode
// signs, or says why not: then the error is a *scope.Refusal. Nobody sees those
// actions here before they are signed, so what bounds them is the scope of the certificate, which
// receivers hold them against, and the TPM, which ends the consent.
func (a *Approver) Consent(ctx context.Context, client *x509.Certificate, r *Request) (*attest.Authorization, error) {
	now := a.now()

	// 1. The certificate: of the CA, in force, of one agent, of a key in reserve mode.
	cred, err := a.certified(ctx, client, r, attest.ModeReserve, now)
	if err != nil {
		return nil, err
	}

	// 2. What this approver lets the agent do on its own.
	reserve := a.config.agents[cred.action.Agent].Reserve
	if reserve == nil {
		return nil, refuse(RuleReserve, "this approver consents to no reserve of %s", cred.action.Agent)
	}
	if err := scope.Contains(reserve.ceiling, cred.scope); err != nil {
		return nil, refuse(RuleScopeWider, "the scope of the reserve's certificate is wider than the one that this approver has: %v", err)
	}

	// 3. Nothing is stopped, at none of its venues.
	for _, venue := range append(cred.scope.Venues(), "") {
		if err := a.killedAt(ctx, cred, venue, now); err != nil {
			return nil, err
		}
	}

	// 4. The record: when this returns, that it consented is on disk.
	until := now.Add(time.Duration(reserve.seconds) * time.Second)
	if err := a.recorded(ctx, a.record.consent(ctx, cred, now, until)); err != nil {
		return nil, err
	}

	// 5. The consent.
	x, err := a.signing.Consent(r.Nonce, reserve.seconds, a.ref)
	if err != nil {
		a.log.ErrorContext(ctx, "the approver's key does not sign", "error", err)
		return nil, refuse(RuleKey, "the approver's key does not sign; its log says why")
	}
	a.log.InfoContext(ctx, "consented to the reserve", "agent", cred.action.Agent, "until", until.UTC().Format(time.RFC3339))
	return x, nil
}

// consent writes down a consent, unless the agent's own entries say that it is stopped.
func (r *Record) consent(ctx context.Context, cred *credential, now, until time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, postgres.Patience)
	defer cancel()
	l := r.ledger(cred.action.Agent)
	for {
		err := r.consentInTurn(ctx, l, cred, now, until)
		if !errors.Is(err, errBehind) {
			return err
		} // what others wrote is read first
	}
}

func (r *Record) consentInTurn(ctx context.Context, l *ledger, cred *credential, now, until time.Time) error {
	agent := cred.action.Agent
	if err := r.turn(ctx, l, agent); err != nil {
		return err
	}
	defer func() { <-l.turn }()
	tx, err := r.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // after Commit it does nothing
	h, err := r.head(ctx, tx, agent)
	if err != nil {
		return err
	}
	if err := l.catchUp(ctx, tx, agent, h); err != nil {
		return err
	}
	if kills := l.book.Kills(); len(kills) > 0 {
		return refuse(scope.RuleKill, "the agent's record: stopped since %s", kills[0].Since.Time.UTC().Format(time.RFC3339))
	}
	if _, err := tx.ExecContext(ctx, "INSERT INTO consent(agent, certificate, time, until) VALUES($1, $2, $3, $4)", agent, cred.sum[:], now.UnixMicro(), until.UnixMicro()); err != nil {
		return err
	}
	return tx.Commit()
}
