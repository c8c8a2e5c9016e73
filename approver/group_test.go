package approver_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"inkan/approver"
	"inkan/approver/client"
	"inkan/attest"
	"inkan/internal/jws"
	"inkan/scope"
	"inkan/simulator"
	"inkan/tpm"
)

// trading is a desk whose key is in a TPM, in approver mode.
type trading struct {
	*desk
	policy *ecdsa.PrivateKey // the policy key
	dev    *tpm.Device
	key    *tpm.Key
	tls    tls.Certificate
}

// newTrading approves the state of a TPM with each of the groups of approvers.
func newTrading(t *testing.T, groups ...[]*ecdsa.PublicKey) *trading {
	t.Helper()
	return newTradingOf(t, newDesk(t), groups...)
}

func newTradingOf(t *testing.T, d *desk, groups ...[]*ecdsa.PublicKey) *trading {
	t.Helper()
	x := &trading{desk: d, policy: newKey(t)}
	var err error
	if x.dev, err = tpm.Open(simulator.TPMForTest(t).Address); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = x.dev.Close() })
	values, err := x.dev.ReadPCRs([]attest.PCRSelection{{Bank: "sha256", Indexes: []int{0, 7}}})
	if err != nil {
		t.Fatal(err)
	}
	area, err := attest.PolicyKeyPublic(&x.policy.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	policies := &tpm.Policies{PolicyKey: area, Ref: policyRef}
	for i, g := range groups {
		p, err := attest.SignPolicy(x.policy, fmt.Sprintf("p.%d", i+1), values, policyRef, g...)
		if err != nil {
			t.Fatal(err)
		}
		policies.Approved = append(policies.Approved, *p)
	}
	auth, err := attest.KeyPolicy(attest.ModeApprover, area, policyRef)
	if err != nil {
		t.Fatal(err)
	}
	file, _, err := x.dev.CreateKey(attest.KeyTemplate(auth))
	if err != nil {
		t.Fatal(err)
	}
	if x.key, err = x.dev.LoadKey(file, policies); err != nil {
		t.Fatal(err)
	}
	x.agent = x.certifyKey(t, x.key, auth, nil)
	c := x.tlsAgent(t, x.agent.ID)
	x.client, x.tls = c.Chain[0], tls.Certificate{Certificate: [][]byte{c.Chain[0].Raw}, PrivateKey: c.Key}
	return x
}

// newRecord is a record in a file.
func newRecord(t *testing.T) *approver.Record {
	t.Helper()
	r, err := approver.OpenRecord(t.Context(), filepath.Join(t.TempDir(), "record.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func (x *trading) group(hedge time.Duration, urls ...string) *client.Group {
	var list []client.Member
	for _, u := range urls {
		list = append(list, client.Member{URL: u, Roots: x.ca.Roots})
	}
	return client.New(list, func() (*tls.Certificate, error) { return &x.tls, nil }, hedge, 20*time.Second)
}

// asking is what the TPM's user gets authorizations through, as the signer does.
type asking struct {
	ctx   context.Context
	group *client.Group
	p     client.Proposal
	asked int // authorizations that came and were taken
}

func (*asking) HashFunc() crypto.Hash { return crypto.SHA256 }

func (a *asking) Authorize(nonce []byte, accept func(string, int32, []byte) (bool, error)) error {
	p := a.p
	p.Nonce = nonce
	return a.group.Authorize(a.ctx, &p, func(approver string, expiration int32, signature []byte) (bool, error) {
		enough, err := accept(approver, expiration, signature)
		if err == nil {
			a.asked++
		}
		return enough, err
	})
}

// order writes the next order of the record, which is then to be signed.
func (x *trading) order(t *testing.T, change func(*scope.Statement)) []byte {
	t.Helper()
	return x.write(t, x.next(t, "1", change))
}

// sign has the TPM sign a statement of the record, with approvers' consent.
func (x *trading) sign(ctx context.Context, g *client.Group, statement []byte) (taken int, err error) {
	header, err := jws.NewHeader("ES256", x.agent.Chain, true)
	if err != nil {
		return 0, err
	}
	st, err := scope.ParseStatement(statement)
	if err != nil {
		return 0, err
	}
	a := &asking{ctx: ctx, group: g, p: client.Proposal{Chain: x.agent.Chain, Statement: statement, Counter: uint64(st.Counter), Entries: func(_ context.Context, from, to uint64) ([][]byte, error) { return x.log[from-1 : to], nil }}}
	input := header.SigningInput(statement)
	signature, err := jws.SignWith(x.key, input, a)
	if err != nil {
		return a.asked, err
	}
	return a.asked, jws.Verify(x.key.Public(), "ES256", input, signature)
}

// TestTwoOfThree: the policy key approved each pair of three approvers, so any
// two serve, each with a record of its own.
func TestTwoOfThree(t *testing.T) {
	a, b, c := newKey(t), newKey(t), newKey(t)
	x := newTrading(t, []*ecdsa.PublicKey{&a.PublicKey, &b.PublicKey}, []*ecdsa.PublicKey{&a.PublicKey, &c.PublicKey}, []*ecdsa.PublicKey{&b.PublicKey, &c.PublicKey})
	keys, records := []*ecdsa.PrivateKey{a, b, c}, []*approver.Record{newRecord(t), newRecord(t), newRecord(t)}
	urls, stops := make([]string, 3), make([]func(), 3)
	for i := range keys {
		urls[i], stops[i] = x.serve(t, keys[i], records[i])
	}
	g := x.group(20*time.Second, urls...) // no hedging here
	for i := range 3 {
		if n, err := x.sign(t.Context(), g, x.order(t, nil)); err != nil || n != 2 {
			t.Fatalf("order %d with three approvers: %d authorizations, %v", i+1, n, err)
		}
	}
	// The first two were enough: the third knows nothing yet.
	err := x.decideBy(t, c, records[2], x.request(x.log[2]))
	refused(t, "the third approver", approver.RuleGap, err)

	for down := range keys {
		stops[down]()
		for range 2 {
			if n, err := x.sign(t.Context(), x.group(20*time.Second, urls...), x.order(t, nil)); err != nil || n != 2 {
				t.Errorf("without approver %d: %d authorizations, %v", down+1, n, err)
			}
		}
		urls[down], stops[down] = x.serve(t, keys[down], records[down])
	}
	// Two of them down: nothing is signed, and later it is.
	stops[0]()
	stops[2]()
	left := x.order(t, nil)
	if _, err := x.sign(t.Context(), x.group(20*time.Second, urls...), left); !errors.Is(err, client.ErrUnreachable) {
		t.Errorf("one approver alone: %v", err)
	}
	urls[2], stops[2] = x.serve(t, c, records[2])
	if _, err := x.sign(t.Context(), x.group(20*time.Second, urls...), left); err != nil {
		t.Errorf("when a second one is back: %v", err)
	}

	// An order out of scope: each refuses.
	bad := x.order(t, func(s *scope.Statement) { q := mustDecimal("301"); s.Order.OrderQty = &q })
	if _, err := x.sign(t.Context(), x.group(20*time.Second, urls...), bad); !isRefusal(err, scope.RuleOrderNotional) {
		t.Errorf("an order out of scope: %v", err)
	}
}

func isRefusal(err error, rule scope.Rule) bool {
	r, ok := errors.AsType[*client.Refused](err)
	return ok && r.Problem.Rule == string(rule)
}

// decideBy has an approver with a key and a record decide, beside those that are served.
func (x *trading) decideBy(t *testing.T, key *ecdsa.PrivateKey, r *approver.Record, q *approver.Request) error {
	t.Helper()
	d := *x.desk
	d.key = key
	d.approver = d.newApprover(t, config(t, ""), r)
	_, err := d.approver.Decide(t.Context(), x.client, q)
	return err
}

// TestFaultyApprovers: an approver that is slow, broken or lies stands before
// an honest one. The TPM signs what the honest one authorized; alone, the bad one gets nothing
// signed, and the TPM is as it was.
func TestFaultyApprovers(t *testing.T) {
	bad, good, stranger := newKey(t), newKey(t), newKey(t)
	x := newTrading(t, []*ecdsa.PublicKey{&bad.PublicKey}, []*ecdsa.PublicKey{&good.PublicKey})
	honest, _ := x.serve(t, good, newRecord(t))
	area := x.key.PublicArea()
	name, err := attest.KeyName(area)
	if err != nil {
		t.Fatal(err)
	}
	header, err := jws.NewHeader("ES256", x.agent.Chain, true)
	if err != nil {
		t.Fatal(err)
	}
	authorize := func(key *ecdsa.PrivateKey, nonce []byte, statement []byte) *attest.Authorization {
		a, err := attest.Authorize(key, nonce, attest.SignCommandHash(name, sha256.Sum256(header.SigningInput(statement))), policyRef)
		if err != nil {
			panic(err)
		}
		return a
	}
	lie := func(f func(q *approver.Request) *attest.Authorization) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			var q approver.Request
			_ = json.Unmarshal(b, &q) // of the client under test
			_ = json.NewEncoder(w).Encode(f(&q))
		}
	}
	refusal := func(status int, rule, value string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/problem+json")
			w.WriteHeader(status)
			fmt.Fprintf(w, `{"type":"about:blank","title":"x","status":%d,"detail":"no","rule":%q,"value":%q}`, status, rule, value)
		}
	}
	for _, f := range []struct {
		name    string
		handler http.HandlerFunc
		refuses scope.Rule // what it is alone; empty: unreachable
	}{
		{"never answers", func(_ http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			<-r.Context().Done() // the client has gone
		}, ""},
		{"hangs up", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, ""},
		{"answers nothing", func(http.ResponseWriter, *http.Request) {}, ""},
		{"answers something else", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`{"approver":1}`)) }, ""},
		{"answers without end", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(bytes.Repeat([]byte(" "), 1<<20)) }, ""},
		{"sends elsewhere", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, honest+r.URL.Path, http.StatusTemporaryRedirect)
		}, ""},
		{"is not well", refusal(http.StatusServiceUnavailable, "record", ""), ""},
		{"refuses", refusal(http.StatusForbidden, "allowed_venues", ""), "allowed_venues"},
		{"always lacks entries", refusal(http.StatusConflict, "gap", "0"), "gap"},
		{"lacks entries that are not there", refusal(http.StatusConflict, "gap", "9000000000000000000"), "gap"},
		{"lacks a negative number of entries", refusal(http.StatusConflict, "gap", "-1"), "gap"},
		{"is another one", lie(func(q *approver.Request) *attest.Authorization { return authorize(stranger, q.Nonce, q.Statement) }), ""},
		{"says that it is another one", lie(func(q *approver.Request) *attest.Authorization {
			a := authorize(bad, q.Nonce, q.Statement)
			a.Approver, _ = attest.ApproverID(&good.PublicKey)
			return a
		}), ""},
		{"authorizes another statement", lie(func(q *approver.Request) *attest.Authorization {
			return authorize(bad, q.Nonce, append(q.Statement, ' '))
		}), ""},
		{"authorizes another session", lie(func(q *approver.Request) *attest.Authorization {
			return authorize(bad, make([]byte, attest.NonceTPMSize), q.Statement)
		}), ""},
		{"authorizes for an hour", lie(func(q *approver.Request) *attest.Authorization {
			a := authorize(bad, q.Nonce, q.Statement)
			a.Expiration = 3600
			return a
		}), ""},
		{"authorizes for good", lie(func(q *approver.Request) *attest.Authorization {
			a := authorize(bad, q.Nonce, q.Statement)
			a.Expiration = -60
			return a
		}), ""},
		{"sends half of an authorization", lie(func(q *approver.Request) *attest.Authorization {
			a := authorize(bad, q.Nonce, q.Statement)
			a.Signature = a.Signature[:len(a.Signature)/2]
			return a
		}), ""},
	} {
		t.Run(f.name, func(t *testing.T) {
			s := httptest.NewUnstartedServer(f.handler)
			certificate, key := x.serverPEM(t, "localhost")
			pair, err := tls.X509KeyPair(certificate, key)
			if err != nil {
				t.Fatal(err)
			}
			s.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
			s.StartTLS()
			defer s.Close()
			defer s.CloseClientConnections()
			url := "https://localhost:" + s.URL[strings.LastIndex(s.URL, ":")+1:]
			b := x.order(t, nil)
			alone, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond) // of one that never answers
			if f.name != "never answers" {
				cancel()
				alone, cancel = context.WithTimeout(t.Context(), 20*time.Second)
			}
			defer cancel()
			switch _, err := x.sign(alone, x.group(time.Second, url), b); {
			case f.refuses != "" && !isRefusal(err, f.refuses):
				t.Errorf("alone: %v, a refusal by %s is expected", err, f.refuses)
			case f.refuses == "" && !errors.Is(err, client.ErrUnreachable):
				t.Errorf("alone: %v", err)
			}
			// Before an honest one: refused, failed or slow, the next one is asked.
			if _, err := x.sign(t.Context(), x.group(10*time.Millisecond, url, honest), b); err != nil {
				t.Errorf("before an honest one: %v", err)
			}
		})
	}
}

// TestDown: the group knows whether approvers answer, and gets consents from the first that gives one.
func TestDown(t *testing.T) {
	key := newKey(t)
	x := newTrading(t, []*ecdsa.PublicKey{&key.PublicKey})
	record := newRecord(t)
	url, stop := x.serve(t, key, record)
	g := x.group(time.Second, url)
	if g.Down() {
		t.Error("down before anybody was asked")
	}
	if _, err := x.sign(t.Context(), g, x.order(t, nil)); err != nil || g.Down() {
		t.Fatalf("down %v: %v", g.Down(), err)
	}
	// A refusal is an answer; and who gives up learns nothing of the approvers.
	nonce := make([]byte, attest.NonceTPMSize)
	consent := func(ctx context.Context, g *client.Group) error {
		return g.Consent(ctx, x.agent.Chain, nonce, func(string, int32, []byte) (bool, error) { return true, nil })
	}
	if err := consent(t.Context(), g); !isRefusal(err, approver.RuleMode) || g.Down() {
		t.Errorf("a consent for a key in approver mode: down %v: %v", g.Down(), err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := consent(gone, g); err == nil || g.Down() {
		t.Errorf("given up: down %v: %v", g.Down(), err)
	}
	stop()
	left := x.order(t, nil)
	if _, err := x.sign(t.Context(), g, left); !errors.Is(err, client.ErrUnreachable) || !g.Down() {
		t.Errorf("no approver: down %v: %v", g.Down(), err)
	}
	if err := g.Probe(t.Context()); !errors.Is(err, client.ErrUnreachable) || !g.Down() {
		t.Errorf("a probe: down %v: %v", g.Down(), err)
	}
	again, _ := x.serve(t, key, record)
	two := x.group(time.Second, url, again) // the first does not answer
	if err := consent(t.Context(), two); !isRefusal(err, approver.RuleMode) || two.Down() {
		t.Errorf("the second approver: down %v: %v", two.Down(), err)
	}
	if err := two.Probe(t.Context()); err != nil {
		t.Errorf("a probe: %v", err)
	}
	if _, err := x.sign(t.Context(), two, left); err != nil || two.Down() {
		t.Errorf("when it is back: down %v: %v", two.Down(), err)
	}
}

// TestRenewedCertificate: connections that were made with a TLS certificate that
// has ended since are made anew, and no order waits for a person.
func TestRenewedCertificate(t *testing.T) {
	d := newDesk(t)
	url, _ := d.serve(t, d.key, d.record)
	pair := func(ends time.Time) *tls.Certificate {
		a := d.ca.Agent(t, d.name, []byte(scopeJSON), func(c *x509.Certificate) {
			c.SerialNumber, c.UnknownExtKeyUsage, c.ExtKeyUsage, c.ExtraExtensions, c.NotAfter = big.NewInt(ends.UnixNano()), nil, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, []pkix.Extension{}, ends
		})
		return &tls.Certificate{Certificate: [][]byte{a.Chain[0].Raw}, PrivateKey: a.Key}
	}
	ends := time.Now().Add(2 * time.Second).Truncate(time.Second)
	var now atomic.Pointer[tls.Certificate]
	now.Store(pair(ends))
	g := client.New([]client.Member{{URL: url, Roots: d.ca.Roots}}, func() (*tls.Certificate, error) { return now.Load(), nil }, time.Minute, 20*time.Second)
	ask := func(b []byte) error {
		p := client.Proposal{Chain: d.agent.Chain, Statement: b, Nonce: make([]byte, attest.NonceTPMSize), Counter: 1}
		return g.Authorize(t.Context(), &p, func(string, int32, []byte) (bool, error) { return true, nil })
	}
	b := d.write(t, d.next(t, "1", nil))
	ask4 := func(when string) {
		t.Helper()
		var wg sync.WaitGroup
		for range 4 { // on as many connections
			wg.Go(func() {
				if err := ask(b); err != nil {
					t.Errorf("%s: %v", when, err)
				}
			})
		}
		wg.Wait()
	}
	ask4("before")
	now.Store(pair(time.Now().Add(time.Hour).Truncate(time.Second)))
	time.Sleep(time.Until(ends.Add(1100 * time.Millisecond)))
	ask4("after the first certificate has ended")
}
