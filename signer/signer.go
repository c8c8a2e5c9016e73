// Package signer signs the actions of agents that run on this host: [Open] a
// [Signer] from its configuration and the agents' keys, [Signer.Serve] its
// socket. Each request takes the numbered steps of docs/design.md:
//
//  1. authenticate the calling process, which maps to one agent
//  2. parse the action
//  3. check it against the scope in the agent's certificate
//  4. record it, durably
//  5. sign the recorded statement
//  6. verify, keep and return the signature
package signer

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"inkan/approver/client"
	"inkan/audit"
	"inkan/internal/clock"
)

// Credentials are an agent's key and its certificate chain, leaf first.
type Credentials struct {
	Key    crypto.Signer
	Chain  []*x509.Certificate // empty: there is none yet
	Device func() DeviceStatus // what operators see of the device; nil: nothing
	// Cancel is another key, with its certificate, that signs cancels alone, so that
	// they need no approver; nil: there is none. Chain is called after each renewal.
	Cancel *CancelCredentials
	// Reserve is one more key, which signs while no approver answers; nil: there is none.
	Reserve *ReserveCredentials
	// Testify has the device say what it signed, for its journal of signatures; nil: it cannot.
	Testify func() error
	Anchor  audit.Anchor // what the record is bound to; nil: an older record in its place is not found out
	// Approvers get the authorizations that a key in approver mode needs; nil: there are none.
	Approvers *client.Group
}

// CancelCredentials are an agent's key for cancels alone.
type CancelCredentials struct {
	Key   crypto.Signer
	Chain func() ([]*x509.Certificate, error)
}

// Renewer gets agents certificates. Renew returns a fresh chain for the
// agent's key and when to ask again.
type Renewer interface {
	Renew(ctx context.Context, agent string) (chain []*x509.Certificate, again time.Time, err error)
}

// Signer serves agents. It is safe for concurrent use.
type Signer struct {
	config  *Config
	agents  map[string]*Agent
	renewer Renewer
	log     *slog.Logger
	metrics *metrics
	digests digestCache
	units   bool // some caller is told by its unit
	bound   *boundListener
	remote  *remote // nil: nobody calls from other hosts
	clock   *clock.Watch
}

// Open opens the agents' records. credentials has an entry for each agent. A
// nil renewer leaves certificates as they are. Close it.
func Open(ctx context.Context, c *Config, credentials map[string]Credentials, renewer Renewer, log *slog.Logger) (_ *Signer, err error) {
	s := &Signer{config: c, agents: make(map[string]*Agent), renewer: renewer, log: log, metrics: newMetrics()}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if c.Remote != nil {
		if s.remote, err = newRemote(c, log); err != nil {
			return nil, err
		}
		s.metrics.registry.MustRegister(s.remote.refused)
	}
	if err := os.MkdirAll(c.StateDir, 0o700); err != nil {
		return nil, err
	}
	if s.clock, err = openClock(c); err != nil {
		return nil, err
	}
	s.metrics.registry.MustRegister(&statusCollector{s})
	for _, ac := range c.Agents {
		cred := credentials[ac.Name]
		if cred.Key == nil {
			return nil, fmt.Errorf("agent %s has no key", ac.Name)
		}
		dir := AgentDir(c.StateDir, ac.Name)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		a := &Agent{name: ac.Name, key: cred.Key, approvers: cred.Approvers, lifetime: ac.lifetime, every: ac.checkpoints, busy: make(chan struct{}, ac.MaxConcurrent), metrics: s.metrics.agent(ac.Name), logger: log, device: cred.Device, testify: cred.Testify, policy: ac.Policy, cancels: cred.Cancel, reserves: cred.Reserve}
		if a.prices, err = openPrices(ac.ReferencePrices, ac.ReferenceKey); err != nil {
			return nil, fmt.Errorf("agent %s: %w", ac.Name, err)
		}
		a.clock, a.maxDivergence, a.now = s.clock, c.Clock.max, s.clock.Time
		o, err := s.anchorOptions(cred.Anchor, ac.bindEvery)
		if err != nil {
			return nil, err
		}
		o.Now = s.clock.Time
		if a.log, err = audit.Open(ctx, filepath.Join(dir, LogFile), o); err != nil {
			return nil, err
		}
		s.agents[ac.Name] = a
		if len(cred.Chain) > 0 {
			if err := errors.Join(a.SetChain(ctx, cred.Chain), a.setOtherChains(ctx)); err != nil {
				return nil, err
			}
		}
		for _, x := range ac.Callers {
			s.units = s.units || x.Unit != ""
		}
	}
	return s, nil
}

// Close closes the records after what is under way has been written.
func (s *Signer) Close() error {
	var errs []error
	for _, a := range s.agents {
		errs = append(errs, a.log.Close())
	}
	return errors.Join(errs...)
}

// Agent returns an agent by its name, or nil.
func (s *Signer) Agent(name string) *Agent { return s.agents[name] }

// Waits of the renewal loop.
const (
	firstRetry = 5 * time.Second
	lastRetry  = 5 * time.Minute
)

// renewAll keeps every agent's certificate fresh until ctx ends.
func (s *Signer) renewAll(ctx context.Context) {
	if s.renewer == nil {
		return
	}
	var wg sync.WaitGroup
	for _, a := range s.agents {
		wg.Go(func() { s.renew(ctx, a) })
	}
	wg.Wait()
}

func (s *Signer) renew(ctx context.Context, a *Agent) {
	wait := a.untilRenewal()
	retry := firstRetry
	for {
		if !pause(ctx, wait, lookAtClock, time.Now) {
			return
		}
		chain, again, err := s.renewer.Renew(ctx, a.name)
		if err == nil && !a.awaits(ctx, chain) {
			return
		}
		if err == nil {
			err = errors.Join(a.SetChain(ctx, chain), a.setOtherChains(ctx))
		}
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			s.metrics.renewals.WithLabelValues(a.name, "failed").Inc()
			s.log.ErrorContext(ctx, "renewal failed", "agent", a.name, "error", err, "retry", retry.String())
			wait, retry = retry, min(2*retry, lastRetry)
			continue
		}
		s.metrics.renewals.WithLabelValues(a.name, "done").Inc()
		s.log.InfoContext(ctx, "certificate renewed", "agent", a.name, "not_after", chain[0].NotAfter)
		s.checkpoint(ctx, a)
		retry = firstRetry
		wait = max(jittered(again.Round(0).Sub(time.Now().Round(0))), firstRetry) // this host's clock may be ahead of the issuer's
	}
}

// awaits waits while a new certificate is not valid yet by this host's clock, which is behind
// the issuer's, and the one before it is: that goes on. It says whether ctx goes on too.
func (a *Agent) awaits(ctx context.Context, chain []*x509.Certificate) bool {
	c, now := a.current.Load(), a.now()
	if c == nil || len(chain) == 0 || c.refuses(now) != nil {
		return true
	}
	early := min(chain[0].NotBefore.Sub(now), c.chain[0].NotAfter.Sub(now))
	if early <= 0 {
		return true
	}
	a.logger.WarnContext(ctx, "the new certificate is not valid yet: see that the clock is right", "agent", a.name, "not_before", chain[0].NotBefore, "wait", early.String())
	return pause(ctx, early, lookAtClock, time.Now)
}

// lookAtClock is how often who waits for a renewal looks at the clock.
const lookAtClock = time.Minute

// pause waits, and says whether it did until the end. Timers stand still while the machine is suspended,
// and a certificate's life does not: what the clock says counts as well.
func pause(ctx context.Context, wait, every time.Duration, now func() time.Time) bool {
	begun := now()
	for left := wait; ; {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(min(left, every)):
		}
		at := now()
		// The longer of what timers and what the clock say has passed.
		if left = wait - max(at.Sub(begun), at.Round(0).Sub(begun.Round(0))); left <= 0 {
			return true
		}
	}
}

// untilRenewal is two thirds of the certificate's life, or nothing if there is none.
func (a *Agent) untilRenewal() time.Duration {
	c := a.current.Load()
	if c == nil {
		return 0
	}
	leaf := c.chain[0]
	return jittered(time.Until(leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) * 2 / 3)))
}

// jittered spreads the renewals of many hosts: up to a tenth earlier.
func jittered(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return d - rand.N(d/10+1)
}
