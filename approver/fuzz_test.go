package approver_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	mrand "math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"inkan/approver"
	"inkan/attest"
	"inkan/scope"
)

// serve starts an approver with a key and a record on a port of this machine,
// until the test or stop ends it.
func (d *desk) serve(t testing.TB, key crypto.Signer, record *approver.Record) (url string, stop func()) {
	t.Helper()
	dir := t.TempDir()
	certificate, private := d.serverPEM(t, "localhost")
	for name, b := range map[string][]byte{"c": certificate, "k": private} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c, err := approver.ParseConfig([]byte("listen: 127.0.0.1:0\ntrust_domain: example.org\nkey: file:k\ncertificate: c\ncertificate_key: k\nca: ca\ncrl_url: http://x/crl\nrecord: r.db\nagents: [{name: mm-07}]\n"), dir)
	if err != nil {
		t.Fatal(err)
	}
	a, err := approver.New(c, key, d.ca.Roots, d, record, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	at, done := make(chan approver.Addresses, 1), make(chan error, 1)
	go func() { done <- a.Serve(ctx, func(a approver.Addresses) { at <- a }) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	_, port, _ := strings.Cut((<-at).Signers, ":")
	return "https://localhost:" + port, stop
}

// httpClient is the agent's.
func (d *desk) httpClient(t testing.TB) *http.Client {
	t.Helper()
	agent := d.tlsAgent(t, d.agent.ID)
	pair := tls.Certificate{Certificate: [][]byte{agent.Chain[0].Raw}, PrivateKey: agent.Key}
	transport := &http.Transport{MaxIdleConnsPerHost: 8, TLSClientConfig: &tls.Config{RootCAs: d.ca.Roots, Certificates: []tls.Certificate{pair}}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// session is a desk with a record: permits that were authorized, a denial, an
// event, and entries of a renewed certificate. Whatever else has one of their numbers is a fork.
func session(t testing.TB) (d *desk, honest []*approver.Request) {
	t.Helper()
	d = newDesk(t)
	add := func(change func(*scope.Statement)) {
		b := d.write(t, d.next(t, "1", change))
		q := d.request(b, d.log[:len(d.log)-1]...)
		if st, err := scope.ParseStatement(b); err != nil {
			t.Fatal(err)
		} else if st.Decision.Decision == scope.DecisionPermit {
			if err := d.decide(q); err != nil {
				t.Fatal(err)
			}
		}
		honest = append(honest, q)
	}
	add(nil)
	add(func(s *scope.Statement) {
		s.Decision = scope.Decision{Decision: scope.DecisionDeny, Rule: scope.RuleSides, Message: "no", Certificate: s.Decision.Certificate, Scope: s.Decision.Scope}
	})
	add(nil)
	return d, honest
}

// mutator makes requests out of honest ones.
type mutator struct {
	*mrand.Rand
	honest []*approver.Request
	other  [][]byte // a chain of another agent
}

// request returns a request that is changed in its bytes, in a member, in the
// statement's fields, or put together from parts of others.
func (m *mutator) request() []byte {
	q := *m.honest[m.IntN(len(m.honest))]
	q.Chain, q.Entries = slices.Clone(q.Chain), slices.Clone(q.Entries)
	switch m.IntN(6) {
	case 0:
		return m.bytes(mustJSON(q))
	case 1:
		return m.member(q)
	case 2:
		q.Statement = m.statement(q.Statement)
	case 3:
		q.Statement = m.bytes(bytes.Clone(q.Statement))
	case 4:
		i := m.IntN(len(q.Chain))
		switch m.IntN(4) {
		case 0:
			q.Chain[i] = m.bytes(bytes.Clone(q.Chain[i]))
		case 1:
			q.Chain = m.other
		case 2:
			q.Chain = append(q.Chain, q.Chain[i])
		case 3:
			q.Chain = append(slices.Clone(m.other), q.Chain...)
		}
	case 5:
		for range 1 + m.IntN(3) {
			other := m.honest[m.IntN(len(m.honest))]
			e := other.Statement
			if m.IntN(2) == 0 {
				e = m.statement(e)
			}
			q.Entries = slices.Insert(q.Entries, m.IntN(len(q.Entries)+1), e)
		}
		q.Statement = m.statement(q.Statement)
	}
	if m.IntN(8) == 0 {
		q.Nonce = q.Nonce[:m.IntN(len(q.Nonce))]
	}
	return mustJSON(q)
}

func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // of values of this test
	}
	return b
}

// bytes flips, cuts and inserts.
func (m *mutator) bytes(b []byte) []byte {
	for range 1 + m.IntN(4) {
		if len(b) == 0 {
			return b
		}
		switch i := m.IntN(len(b)); m.IntN(4) {
		case 0:
			b[i] ^= 1 << m.IntN(8)
		case 1:
			b = append(b[:i], b[min(len(b), i+1+m.IntN(8)):]...)
		case 2:
			b = slices.Insert(b, i, byte(m.Uint32()))
		case 3:
			b = slices.Insert(b, i, b[:min(i, 64)]...)
		}
	}
	return b
}

// member replaces a member by something of another form, or adds one.
func (m *mutator) member(q approver.Request) []byte {
	var doc map[string]json.RawMessage
	if err := json.Unmarshal(mustJSON(q), &doc); err != nil {
		panic(err)
	}
	names := []string{"chain", "nonce", "statement", "entries", "digest", "cpHash", "expiration", "key", "Chain", "STATEMENT", ""}
	values := []string{"null", "true", "0", "-1", "1e400", `""`, `"AAAA"`, "[]", "{}", `[""]`, `["AAAA"]`, "[[[[]]]]", `{"chain":[]}`, string(mustJSON(make([]byte, 32))), string(doc["statement"]), string(doc["chain"]),
		`"` + strings.Repeat("A", 64<<10) + `"`, strings.Repeat("[", 2000) + strings.Repeat("]", 2000), `"\ud800"`}
	name := names[m.IntN(len(names))]
	doc[name] = json.RawMessage(values[m.IntN(len(values))])
	if m.IntN(4) == 0 {
		delete(doc, names[m.IntN(4)])
	}
	var out bytes.Buffer
	out.WriteByte('{')
	for i, n := range slices.Sorted(maps.Keys(doc)) {
		if i > 0 {
			out.WriteByte(',')
		}
		fmt.Fprintf(&out, "%s:%s", mustJSON(n), doc[n])
		if m.IntN(16) == 0 { // twice
			fmt.Fprintf(&out, ",%s:%s", mustJSON(n), doc[n])
		}
	}
	out.WriteByte('}')
	return out.Bytes()
}

// statement changes fields, and keeps it a statement in its one spelling where that is possible.
func (m *mutator) statement(b []byte) []byte {
	st, err := scope.ParseStatement(b)
	if err != nil {
		return b
	}
	for range 1 + m.IntN(3) {
		switch m.IntN(14) {
		case 0:
			st.Counter += scope.Counter(m.IntN(5)) - 2
		case 1:
			st.Previous[m.IntN(32)] ^= 1
		case 2:
			st.ID = newID()
		case 3:
			st.Agent = "spiffe://example.org/agent/mm-0" + fmt.Sprint(m.IntN(10))
		case 4:
			st.Audience = []string{"XLON", "XPAR", ""}[m.IntN(3)]
		case 5:
			st.Expires += int64(m.IntN(1000)) - 500
		case 6:
			st.Decision.Certificate[m.IntN(32)] ^= 1
		case 7:
			st.Decision.Scope[m.IntN(32)] ^= 1
		case 8:
			st.Decision.Decision = []string{scope.DecisionPermit, scope.DecisionDeny, scope.DecisionEvent, ""}[m.IntN(4)]
		case 9:
			st.Decision.Utilisation = st.Decision.Utilisation[:m.IntN(len(st.Decision.Utilisation)+1)]
		case 10:
			st.Decision.Notional = &scope.Amount{Amount: mustDecimal(fmt.Sprint(m.IntN(100))), Currency: "EUR"}
		case 11:
			if st.Order != nil {
				o := *st.Order
				q := mustDecimal(fmt.Sprint(1 + m.IntN(1000)))
				o.OrderQty = &q
				st.Order = &o
			}
		case 12:
			st.Kind = []scope.Kind{scope.OrderNew, scope.OrderCancel, scope.EventKill, "payment"}[m.IntN(4)]
		case 13:
			st.Attestation.Evidence = "01"
		}
	}
	changed, err := st.Marshal()
	if err != nil {
		return b
	}
	return changed
}

// authorizable says whether a request asks for what was authorized before: the
// same statement, under the same certificate, if for another session or in another spelling.
func authorizable(body []byte, honest []*approver.Request) bool {
	q, err := approver.ParseRequest(body, true)
	if err != nil {
		return false
	}
	for _, h := range honest {
		if bytes.Equal(q.Statement, h.Statement) && slices.EqualFunc(q.Chain, h.Chain, bytes.Equal) {
			return true
		}
	}
	return false
}

// TestFuzzedRequests: 10,000 changed requests over the network get no
// authorization, no internal error, and leave nothing behind.
func TestFuzzedRequests(t *testing.T) {
	d, honest := session(t)
	url, _ := d.serve(t, d.key, d.record)
	client := d.httpClient(t)
	m := &mutator{Rand: mrand.New(mrand.NewPCG(1, 2)), honest: honest, other: newDesk(t).request(nil).Chain}
	const total, workers = 10_000, 8
	bodies := make(chan []byte)
	var mu sync.Mutex
	answers := make(map[int]int)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for body := range bodies {
				status, answer, err := post(client, url+"/v1/authorizations", body)
				switch {
				case err != nil:
					t.Errorf("no answer: %v", err)
				case status == http.StatusOK, strings.Contains(answer, `"signature":`):
					t.Errorf("authorized: %s", body)
				case status >= 500:
					t.Errorf("answered %d: %s to %s", status, answer, body)
				}
				mu.Lock()
				answers[status]++
				mu.Unlock()
			}
		})
	}
	for n := 0; n < total; {
		if body := m.request(); !authorizable(body, honest) {
			bodies <- body
			n++
		}
	}
	close(bodies)
	wg.Wait()
	t.Logf("answers by status: %v", answers)
	for status, least := range map[int]int{http.StatusBadRequest: total / 10, http.StatusForbidden: total / 10} { // they get past the parser, and do not
		if answers[status] < least {
			t.Errorf("%d answers of status %d: the changes are all of one kind", answers[status], status)
		}
	}
	for i, q := range honest {
		if status, answer, err := post(client, url+"/v1/authorizations", mustJSON(q)); err != nil || i != 1 && status != http.StatusOK || i == 1 && status != http.StatusForbidden {
			t.Errorf("honest request %d after them: %d %s %v", i, status, answer, err)
		}
	}
	if status, answer, err := post(client, url+"/v1/authorizations", mustJSON(d.request(d.write(t, d.next(t, "1", nil))))); err != nil || status != http.StatusOK {
		t.Errorf("the next statement after them: %d %s %v", status, answer, err)
	}
}

// TestFuzzedEntries: what is handed over as entries is never an authorization, and only the next entries are taken.
func TestFuzzedEntries(t *testing.T) {
	d, honest := session(t)
	url, _ := d.serve(t, d.key, d.record)
	client := d.httpClient(t)
	m := &mutator{Rand: mrand.New(mrand.NewPCG(3, 4)), honest: honest, other: newDesk(t).request(nil).Chain}
	for range 1000 {
		var q approver.Request
		if json.Unmarshal(m.request(), &q) != nil {
			continue
		}
		q.Nonce, q.Entries, q.Statement = nil, append(q.Entries, q.Statement), nil
		if status, answer, err := post(client, url+"/v1/entries", mustJSON(&q)); err != nil || status >= 500 || strings.Contains(answer, `"signature":`) {
			t.Fatalf("answered %d %s %v", status, answer, err)
		}
	}
	// Entries that nobody authorizes may have been taken; the first ones are as they were.
	for i, q := range honest {
		if status, answer, err := post(client, url+"/v1/authorizations", mustJSON(q)); err != nil || i != 1 && status != http.StatusOK {
			t.Errorf("honest request %d after them: %d %s %v", i, status, answer, err)
		}
	}
}

func post(client *http.Client, url string, body []byte) (status int, answer string, err error) {
	res, err := client.Post(url, "application/json", bytes.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return res.StatusCode, string(b), err
}

func FuzzParseRequest(f *testing.F) {
	f.Add([]byte(`{"chain":["AAAA"],"nonce":"AAAA","statement":"AAAA"}`))
	f.Add([]byte(`{"chain":["AAAA"],"entries":["AAAA"]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, authorize := range []bool{true, false} {
			q, err := approver.ParseRequest(b, authorize)
			if err != nil {
				continue
			}
			if authorize && (len(q.Nonce) != attest.NonceTPMSize || len(q.Statement) == 0) || len(q.Chain) == 0 {
				t.Fatalf("%+v was taken", q)
			}
		}
	})
}

// FuzzDecide: of all requests, those alone are authorized that were before.
func FuzzDecide(f *testing.F) {
	d, honest := session(f)
	for _, q := range honest {
		f.Add(mustJSON(q))
	}
	m := &mutator{Rand: mrand.New(mrand.NewPCG(5, 6)), honest: honest, other: newDesk(f).request(nil).Chain}
	for range 32 {
		f.Add(m.request())
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		q, err := approver.ParseRequest(body, true)
		if err != nil {
			return
		}
		if _, err := d.approver.Decide(context.Background(), d.client, q); err == nil && !authorizable(body, honest) {
			t.Fatalf("authorized: %s", base64.StdEncoding.EncodeToString(q.Statement))
		}
	})
}
