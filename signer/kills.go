package signer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"inkan/scope"
)

// maxKillList bounds the issuer's answer, in bytes.
const maxKillList = 128 << 10

// killSource gets the issuer's kill list over TLS that ends at the pinned CA.
type killSource struct {
	client *http.Client
	url    string
	ca     *x509.Certificate
	number scope.Counter // of the last list
	taken  map[string]bool
}

func newKillSource(c *IssuerConfig) (*killSource, error) {
	b, err := os.ReadFile(c.CA)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("%s: a certificate in PEM is expected", c.CA)
	}
	ca, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.CA, err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	return &killSource{ca: ca, url: strings.TrimSuffix(c.URL, "/") + "/v1/kills", taken: make(map[string]bool),
		client: &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots}}}}, nil
}

func (k *killSource) get(ctx context.Context, now time.Time) (*scope.KillList, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.url, nil)
	if err != nil {
		return nil, err
	}
	res, err := k.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxKillList))
	switch {
	case err != nil:
		return nil, err
	case res.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("%s answered %s", k.url, res.Status)
	}
	l, err := scope.ParseKillList(strings.TrimSuffix(string(b), "\n"), k.ca.PublicKey)
	switch {
	case err != nil:
		return nil, err
	case l.Number < k.number:
		return nil, errors.New("the kill list is older than the one before")
	case now.After(l.NextUpdate):
		return nil, fmt.Errorf("the kill list is from %s and was to be renewed by %s", l.ThisUpdate.Format(time.RFC3339), l.NextUpdate.Format(time.RFC3339))
	}
	k.number = l.Number
	return l, nil
}

// watchKills takes over the issuer's kills until ctx ends.
func (s *Signer) watchKills(ctx context.Context) {
	if s.renewer == nil { // there is no issuer
		return
	}
	source, err := newKillSource(&s.config.Issuer)
	if err != nil {
		s.log.ErrorContext(ctx, "the issuer's kills cannot be seen", "error", err)
		return
	}
	tick := time.NewTicker(s.config.Issuer.kills)
	defer tick.Stop()
	for {
		l, err := source.get(ctx, time.Now())
		if err == nil {
			s.metrics.killList.SetToCurrentTime()
			err = s.takeKills(ctx, source, l)
		}
		if err != nil && ctx.Err() == nil {
			s.log.ErrorContext(ctx, "the issuer's kills were not taken over", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// takeKills makes each kill an event of the agents that it is about, once.
func (s *Signer) takeKills(ctx context.Context, source *killSource, l *scope.KillList) error {
	var failed error
	for i := range l.Kills {
		k := &l.Kills[i]
		for name, a := range s.agents {
			cred := a.current.Load()
			if cred == nil || !k.Stops(cred.action.Agent) || source.taken[name+" "+k.ID] {
				continue
			}
			e, err := (&scope.Kill{Scope: k.Scope, Venue: k.Venue, Reason: k.Reason, By: "issuer", ID: k.ID}).Event(cred.scope)
			if err == nil {
				_, err = a.log.Event(ctx, e, cred.identity)
			}
			if err != nil && !errors.Is(err, &scope.Refusal{Rule: scope.RuleKillKnown}) {
				failed = errors.Join(failed, fmt.Errorf("agent %s: %w", name, err))
				continue
			}
			source.taken[name+" "+k.ID] = true
			s.log.WarnContext(ctx, "stopped by the issuer", "agent", name, "kill", k.ID)
		}
	}
	return failed
}
