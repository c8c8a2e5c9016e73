package signer

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"

	"inkan/approver/client"
	"inkan/internal/certext"
)

// ReserveCredentials are an agent's key in reserve mode: it signs, in the
// narrower scope of its own certificate, while no approver answers, if one consented not long before.
type ReserveCredentials struct {
	Key   crypto.Signer
	Chain func() ([]*x509.Certificate, error)
	// Renew gets a consent and returns until when it serves. It calls Authorize of
	// what it is given, as the key of an agent in approver mode does.
	Renew func(crypto.SignerOpts) (until time.Time, err error)
	Until func() time.Time // of the consent that is in force; the zero time: none is
}

// Waits of the loop that keeps a consent.
const (
	probeWait   = time.Second      // while no approver answers
	refusedWait = 30 * time.Second // after a refusal
	longestWait = 5 * time.Minute
)

// onReserve says whether actions are signed with the reserve's key now.
func (a *Agent) onReserve() bool {
	return a.reserve.Load() != nil && a.approvers != nil && a.approvers.Down() && time.Now().Before(a.reserves.Until())
}

// setReserveChain takes the certificate of the reserve's key.
func (a *Agent) setReserveChain(ctx context.Context) error {
	if a.reserves == nil {
		return nil
	}
	chain, err := a.reserves.Chain()
	if err != nil {
		return fmt.Errorf("agent %s: reserve: %w", a.name, err)
	}
	c, err := newCredential(chain, a.reserves.Key, a.lifetime)
	if err != nil {
		return fmt.Errorf("agent %s: reserve: %w", a.name, err)
	}
	if mode := c.action.Attestation.Mode; mode != certext.ModeReserve {
		return fmt.Errorf("agent %s: reserve: the certificate is for a key in mode %.16q", a.name, mode)
	}
	if err := a.log.AddCertificate(ctx, chain); err != nil {
		return err
	}
	a.reserve.Store(c)
	return nil
}

// keepReserves keeps a consent in force for each agent with a reserve, and
// sees when approvers answer again, until ctx ends.
func (s *Signer) keepReserves(ctx context.Context) {
	var wg sync.WaitGroup
	for _, a := range s.agents {
		if a.reserves != nil && a.approvers != nil {
			wg.Go(func() { a.keepReserve(ctx) })
		}
	}
	wg.Wait()
}

func (a *Agent) keepReserve(ctx context.Context) {
	said := ""
	for {
		wait, err := a.renewConsent(ctx)
		a.metrics.reserveUntil.Set(float64(max(a.reserves.Until().Unix(), 0)))
		now := ""
		if err != nil {
			now = err.Error()
		}
		if now != said && ctx.Err() == nil { // once, and not each time it is tried
			if err != nil {
				a.logger.ErrorContext(ctx, "no consent to the reserve", "agent", a.name, "error", err)
			} else {
				a.logger.InfoContext(ctx, "the reserve has a consent", "agent", a.name, "until", a.reserves.Until().UTC().Format(time.RFC3339))
			}
			said = now
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// renewConsent gets the next consent, and says when to come again. While no
// approver answers it asks them alone, and leaves the device to the actions.
func (a *Agent) renewConsent(ctx context.Context) (wait time.Duration, err error) {
	if a.approvers.Down() {
		if err := a.approvers.Probe(ctx); err != nil {
			return probeWait, err
		}
	}
	cred := a.reserve.Load()
	if cred == nil {
		return probeWait, errors.New("there is no certificate yet")
	}
	until, err := a.reserves.Renew(&consent{ctx, a, cred.chain})
	switch {
	case errors.Is(err, client.ErrUnreachable):
		return probeWait, err
	case err != nil:
		return refusedWait, err
	}
	return min(max(time.Until(until)/3, probeWait), longestWait), nil
}

// consent is what a device asks for a consent with: the options of its Renew.
type consent struct {
	ctx   context.Context
	agent *Agent
	chain []*x509.Certificate
}

// HashFunc implements crypto.SignerOpts.
func (*consent) HashFunc() crypto.Hash { return crypto.SHA256 }

// Authorize asks the approvers for the device's session.
func (x *consent) Authorize(nonce []byte, accept func(approver string, expiration int32, signature []byte) (bool, error)) error {
	return x.agent.approvers.Consent(x.ctx, x.chain, nonce, accept)
}
