// Package client asks approvers for authorizations: [New] makes a [Group] of
// them, [Group.Authorize] asks in order and does not wait for one that is slow.
package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"inkan/internal/problem"
	"inkan/internal/strictjson"
)

// Bounds of what goes to an approver and comes back, in bytes.
const (
	maxAnswer  = 64 << 10
	maxEntries = 256     // in one request
	maxBytes   = 1 << 20 // of entries in one request
)

// ErrUnreachable: no approver answered, or none with an authorization that the device takes.
var ErrUnreachable = errors.New("no approver gave an authorization")

// Refused says that an approver refused, and by which rule.
type Refused struct {
	URL     string
	Problem *problem.Problem
}

func (r *Refused) Error() string { return "approver " + r.URL + " refuses: " + r.Problem.Error() }

func (r *Refused) Unwrap() error { return r.Problem }

// Proposal is an action that stands in the signer's record and is to be signed.
type Proposal struct {
	Chain     []*x509.Certificate // the action certificate first, without the root
	Statement []byte              // exact bytes
	Counter   uint64              // its number in the record
	Nonce     []byte              // nonceTPM
	// Entries returns the statements with the numbers from and to and those
	// between them, or the first of them.
	Entries func(ctx context.Context, from, to uint64) ([][]byte, error)
}

// Member is one approver.
type Member struct {
	URL   string         // https
	Roots *x509.CertPool // that its TLS certificate chains to
}

// Group is the approvers that one agent's signer asks. It is safe for
// concurrent use.
type Group struct {
	members []*member
	hedge   time.Duration
	timeout time.Duration
	needed  atomic.Int32 // how many authorizations the last signature took: so many are asked at once
	down    atomic.Bool  // the last time no approver answered
}

type member struct {
	url  string
	http *http.Client
	have atomic.Int64 // entries that it is known to have; -1: it was not asked yet
}

// New makes a group. certificate returns the agent's TLS certificate, at each
// handshake. An approver that has not answered after hedge is left to its
// work, and the next one is asked besides; after timeout all are given up.
func New(list []Member, certificate func() (*tls.Certificate, error), hedge, timeout time.Duration) *Group {
	g := &Group{hedge: hedge, timeout: timeout}
	for _, m := range list {
		x := &member{url: strings.TrimSuffix(m.URL, "/"), http: &http.Client{
			Transport: &http.Transport{
				TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: m.Roots,
					GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return certificate() }},
				MaxIdleConnsPerHost: 16, IdleConnTimeout: 5 * time.Minute, DisableCompression: true, ForceAttemptHTTP2: false, TLSHandshakeTimeout: timeout,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}}
		x.have.Store(-1)
		g.members = append(g.members, x)
	}
	return g
}

// answer of one approver.
type answer struct {
	Approver   string `json:"approver"`
	Expiration int32  `json:"expiration"`
	Signature  []byte `json:"signature"`
}

// Authorize gets authorizations and hands each to accept, one at a time, until
// accept says that there are enough. As many approvers are asked at once as the last
// signature needed, in their order. accept's error means that the approver gave what
// is of no use; then the next one is asked. The error is a *[Refused] if an approver refused, or
// else [ErrUnreachable] with what went wrong.
func (g *Group) Authorize(ctx context.Context, p *Proposal, accept func(approver string, expiration int32, signature []byte) (enough bool, err error)) error {
	err := g.authorize(ctx, p, accept)
	g.answered(ctx, err)
	return err
}

// answered remembers whether approvers answer. Who gave up before they could says nothing of them.
func (g *Group) answered(ctx context.Context, err error) {
	switch {
	case err == nil, isRefused(err):
		g.down.Store(false)
	case errors.Is(err, ErrUnreachable) && ctx.Err() == nil:
		g.down.Store(true)
	}
}

func isRefused(err error) bool {
	_, ok := errors.AsType[*Refused](err)
	return ok
}

// Down says whether no approver answered when one was asked last.
func (g *Group) Down() bool { return g.down.Load() }

// Probe asks whether an approver answers again.
func (g *Group) Probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, g.timeout)
	defer cancel()
	var errs []error
	for _, m := range g.members {
		err := m.get(ctx, "/v1/approver")
		if err == nil || isRefused(err) {
			g.down.Store(false)
			return nil
		}
		errs = append(errs, fmt.Errorf("approver %s: %w", m.url, err))
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, errors.Join(errs...))
}

// Consent asks the approvers in their order for a consent to what the key of a
// certificate, in reserve mode, signs, and hands it to accept, as Authorize does.
func (g *Group) Consent(ctx context.Context, chain []*x509.Certificate, nonce []byte, accept func(approver string, expiration int32, signature []byte) (enough bool, err error)) error {
	err := g.consent(ctx, chain, nonce, accept)
	g.answered(ctx, err)
	return err
}

func (g *Group) consent(ctx context.Context, chain []*x509.Certificate, nonce []byte, accept func(approver string, expiration int32, signature []byte) (enough bool, err error)) error {
	r := &request{Nonce: nonce}
	for _, c := range chain {
		r.Chain = append(r.Chain, c.Raw)
	}
	var refused *Refused
	var errs []error
	for _, m := range g.members {
		a := new(answer)
		err := m.postFor(ctx, g.timeout, "/v1/consents", r, a)
		if err == nil {
			var enough bool
			if enough, err = accept(a.Approver, a.Expiration, a.Signature); enough && err == nil {
				return nil
			}
		}
		if x, ok := errors.AsType[*Refused](err); ok && refused == nil {
			refused = x
		}
		errs = append(errs, fmt.Errorf("approver %s: %w", m.url, err))
	}
	if refused != nil {
		return refused
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, errors.Join(errs...))
}

func (g *Group) authorize(ctx context.Context, p *Proposal, accept func(approver string, expiration int32, signature []byte) (enough bool, err error)) error {
	ctx, cancel := context.WithTimeout(ctx, g.timeout)
	defer cancel()
	type outcome struct {
		m   *member
		a   *answer
		err error
	}
	results := make(chan outcome, len(g.members))
	next, running := 0, 0
	start := func() {
		m := g.members[next]
		next++
		running++
		go func() {
			a, err := m.authorize(ctx, p)
			results <- outcome{m, a, err}
		}()
	}
	var refused *Refused
	var errs []error
	var accepted int32
	hedge := time.NewTimer(g.hedge)
	defer hedge.Stop()
	for range min(int(g.needed.Load()), len(g.members)) {
		start()
	}
	for {
		if running == 0 {
			if next == len(g.members) {
				break
			}
			start()
			hedge.Reset(g.hedge)
		}
		select {
		case o := <-results:
			running--
			err := o.err
			if err == nil {
				enough, bad := accept(o.a.Approver, o.a.Expiration, o.a.Signature)
				if bad == nil {
					accepted++
				}
				if enough {
					g.needed.Store(accepted)
					return nil
				}
				if bad == nil {
					continue // one of several
				}
				err = bad
			}
			if r, ok := errors.AsType[*Refused](err); ok && refused == nil {
				refused = r
			}
			errs = append(errs, fmt.Errorf("approver %s: %w", o.m.url, err))
			if next < len(g.members) { // another one in its place
				start()
				hedge.Reset(g.hedge)
			}
		case <-hedge.C:
			if next < len(g.members) {
				start()
				hedge.Reset(g.hedge)
			}
		case <-ctx.Done():
			errs = append(errs, ctx.Err())
			running, next = 0, len(g.members)
		}
	}
	if refused != nil {
		return refused
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, errors.Join(errs...))
}

type request struct {
	Chain     [][]byte `json:"chain"`
	Nonce     []byte   `json:"nonce,omitempty"`
	Statement []byte   `json:"statement,omitempty"`
	Entries   [][]byte `json:"entries,omitempty"`
}

// authorize asks one approver. If it says that it lacks entries, it gets them.
func (m *member) authorize(ctx context.Context, p *Proposal) (*answer, error) {
	r := &request{Nonce: p.Nonce, Statement: p.Statement}
	for _, c := range p.Chain {
		r.Chain = append(r.Chain, c.Raw)
	}
	for tries := 0; ; tries++ {
		var err error
		have := m.have.Load()
		if r.Entries = nil; have >= 0 { // else its answer says how many it has
			if r.Entries, err = m.lacking(ctx, p, r.Chain, uint64(have)); err != nil {
				return nil, err
			}
		}
		var a answer
		err = m.post(ctx, "/v1/authorizations", r, &a)
		if err == nil {
			m.has(p.Counter)
			return &a, nil
		}
		x, ok := errors.AsType[*Refused](err)
		if !ok || x.Problem.Rule != "gap" || tries == 3 {
			return nil, err
		}
		n, parse := strconv.ParseUint(x.Problem.Value, 10, 63)
		if parse != nil || n >= p.Counter {
			return nil, err
		}
		m.have.Store(int64(n))
	}
}

// lacking returns the entries between those that the approver has and the
// statement. What does not fit into the request is sent before.
func (m *member) lacking(ctx context.Context, p *Proposal, chain [][]byte, have uint64) ([][]byte, error) {
	for have+1 < p.Counter {
		var some [][]byte
		size := 0
		list, err := p.Entries(ctx, have+1, min(p.Counter-1, have+maxEntries))
		if err != nil {
			return nil, err
		}
		for _, b := range list {
			if size += len(b); size > maxBytes && len(some) > 0 {
				break
			}
			some = append(some, b)
		}
		if len(some) == 0 {
			return nil, errors.New("the record has not the entries that the approver lacks")
		}
		if have+uint64(len(some)) == p.Counter-1 {
			return some, nil
		}
		if err := m.post(ctx, "/v1/entries", &request{Chain: chain, Entries: some}, &struct{}{}); err != nil {
			return nil, err
		}
		have += uint64(len(some))
		m.has(have)
	}
	return nil, nil
}

// has remembers that the approver has n entries at least.
func (m *member) has(n uint64) {
	for old := m.have.Load(); old < int64(n) && !m.have.CompareAndSwap(old, int64(n)); old = m.have.Load() {
	}
}

// postFor is post within a time.
func (m *member) postFor(ctx context.Context, d time.Duration, path string, in *request, out any) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	return m.post(ctx, path, in, out)
}

// post asks again on a new connection where the approver does not take the TLS
// certificate: the connection may be older than the one that the agent has now.
func (m *member) post(ctx context.Context, path string, in *request, out any) error {
	for tries := 0; ; tries++ {
		err := m.once(ctx, path, in, out)
		x, ok := errors.AsType[*Refused](err)
		if !ok || tries == 2 || x.Problem.Rule != "client" && x.Problem.Rule != "certificate_revoked" {
			return err
		}
		m.http.CloseIdleConnections()
	}
}

func (m *member) once(ctx context.Context, path string, in *request, out any) error {
	b, err := strictjson.Marshal(in)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, m.url+path, bytes.NewReader(b))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	return m.do(req, out)
}

func (m *member) get(ctx context.Context, path string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, m.url+path, nil)
	if err != nil {
		return err
	}
	return m.do(req, &struct {
		Approver    string `json:"approver"`
		TrustDomain string `json:"trust_domain"`
	}{})
}

func (m *member) do(req *http.Request, out any) error {
	res, err := m.http.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	if err != nil {
		return err
	}
	if res.StatusCode == http.StatusOK {
		return strictjson.Unmarshal(b, maxAnswer, out)
	}
	x := problem.Parse(res.StatusCode, res.Header.Get("Content-Type"), b)
	if x.Rule == "" || x.Status == http.StatusServiceUnavailable {
		return x // it did not decide
	}
	return &Refused{m.url, x}
}
