package gate_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"inkan/internal/jws"
	"inkan/internal/problem"
	"inkan/internal/testca"
	"inkan/internal/testlog"
	"inkan/scope"
	"inkan/verify"
	"inkan/verify/gate"
	"inkan/verify/message"
)

const scopeJSON = `{"version":1,"allowed_actions":["order.new","order.cancel"],"allowed_instruments":[{"id":"isin:FR0000120271"}],"allowed_ord_types":["2"],"allowed_sides":["1"],"allowed_tif":["0"],"allowed_venues":["XPAR"],"max_order_notional":[{"amount":"25000","currency":"EUR"}]}`

const goodBody = `{"clOrdId":"A-1","symbol":"FR0000120271","side":"buy","qty":100,"price":"50","type":"limit","tag":{"x":1}}`

// request is one that the backend got.
type request struct {
	*http.Request
	body []byte
}

// site is a gate on a real socket, its backend on another, and an agent.
type site struct {
	ca     *testca.CA
	agent  *testca.Agent
	config gate.Config
	scope  *scope.Scope
	addr   string
	got    chan request // what the backend got
	answer http.HandlerFunc
	log    *testlog.Lines

	mu   sync.Mutex
	next uint64
}

// venueRoutes are those of a small venue: new orders as JSON, cancels by path.
func venueRoutes() []message.Route {
	return []message.Route{
		{
			Method: "POST", Path: "/orders", Kinds: []scope.Kind{scope.OrderNew},
			Body: map[string]message.Member{
				"clOrdId": {Field: "ord.ClOrdID"},
				"symbol":  {Field: "ord.SecurityID"},
				"side":    {Field: "ord.Side", Values: map[string]string{"buy": "1", "sell": "2"}},
				"qty":     {Field: "ord.OrderQty"},
				"price":   {Field: "ord.Price"},
				"type":    {Const: "limit"},
				"tag":     {Free: true},
			},
			Implied: map[string]string{"ord.SecurityIDSource": "4", "ord.OrdType": "2", "ord.Currency": "EUR", "ord.TimeInForce": "0"},
		},
		{Method: "DELETE", Path: "/orders/{ord.OrigClOrdID}", Kinds: []scope.Kind{scope.OrderCancel}, Implied: map[string]string{"ord.ClOrdID": "*"}},
		{Method: "POST", Path: "/opaque", Kinds: []scope.Kind{scope.OrderNew}, Opaque: true},
	}
}

// newSite returns a site that is not serving yet; a test changes its config.
func newSite(t testing.TB) *site {
	t.Helper()
	s := &site{ca: testca.New(t), got: make(chan request, 100), log: new(testlog.Lines)}
	var err error
	if s.scope, err = scope.Parse([]byte(scopeJSON)); err != nil {
		t.Fatal(err)
	}
	s.agent = s.ca.Agent(t, "a", s.scope.Canonical(), nil)
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		b, err := io.ReadAll(req.Body)
		if err != nil {
			t.Errorf("the backend reads: %v", err)
		}
		s.got <- request{req, b}
		if s.answer != nil {
			s.answer(w, req)
			return
		}
		w.Header().Set("Alt-Svc", `h2="elsewhere:443"`)
		fmt.Fprint(w, "acknowledged")
	}))
	t.Cleanup(backend.Close)
	u, err := url.Parse(backend.URL)
	if err != nil {
		t.Fatal(err)
	}
	server := certificate(t, s.ca, func(c *x509.Certificate) {
		c.URIs, c.IPAddresses, c.ExtKeyUsage = nil, []net.IP{net.IPv4(127, 0, 0, 1)}, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	})
	s.config = gate.Config{
		Receiver:       verify.Config{Audiences: []string{"XPAR"}, Roots: s.ca.Roots, Revocation: verify.NoRevocation{}, Replay: verify.NewMemoryStore(1000, time.Now().Add(-time.Hour))},
		Routes:         venueRoutes(),
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &server, nil },
		TrustDomain:    "example.org",
		Backend:        u,
		Log:            slog.New(slog.NewTextHandler(s.log, nil)),
	}
	return s
}

// rescope gives the agent a certificate whose scope has more members, in JSON.
func (s *site) rescope(t testing.TB, members string) {
	t.Helper()
	var err error
	if s.scope, err = scope.Parse([]byte(strings.Replace(scopeJSON, `{`, `{`+members+`,`, 1))); err != nil {
		t.Fatal(err)
	}
	s.agent = s.ca.Agent(t, "a", s.scope.Canonical(), nil)
}

// serve starts the gate; it ends with the test, and must end well.
func (s *site) serve(t testing.TB) *gate.Gate {
	t.Helper()
	g, err := gate.New(s.config)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the gate ended with %v", err)
		}
	})
	return g
}

// certificate is an agent's TLS certificate; change makes it another.
func certificate(t testing.TB, ca *testca.CA, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return certificateWithKey(t, ca, k, change)
}

func certificateWithKey(t testing.TB, ca *testca.CA, k *ecdsa.PrivateKey, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: serial.Add(serial, big.NewInt(2)), Subject: pkix.Name{CommonName: "a"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/agent/a"}},
	}
	if change != nil {
		change(c)
	}
	der, err := x509.CreateCertificate(rand.Reader, c, ca.Certificate, &k.PublicKey, ca.Key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k, Leaf: leaf}
}

// client has its own connections.
func (s *site) client(t testing.TB, certificates ...tls.Certificate) *http.Client {
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.ca.Roots, Certificates: certificates}, ForceAttemptHTTP2: true, DisableCompression: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second}
}

func (s *site) good(t testing.TB) *http.Client {
	t.Helper()
	return s.client(t, certificate(t, s.ca, nil))
}

func dec(s string) *scope.Decimal {
	d, err := scope.ParseDecimal(s)
	if err != nil {
		panic(err)
	}
	return &d
}

// sign makes a signed action for a body, of the site's agent or of another.
func (s *site) sign(t testing.TB, agent *testca.Agent, body []byte, change func(*scope.Statement)) string {
	t.Helper()
	s.mu.Lock()
	s.next++
	n := s.next
	s.mu.Unlock()
	var id [16]byte
	_, _ = rand.Read(id[:])
	now := time.Now().UTC().Truncate(time.Microsecond)
	sum := sha256.Sum256(body)
	st := &scope.Statement{
		Version: 1, Issuer: "CN=Test CA", Agent: agent.ID, Audience: "XPAR", ID: base64.RawURLEncoding.EncodeToString(id[:]), Counter: scope.Counter(n), Time: scope.Timestamp{Time: now}, Expires: now.Add(30 * time.Second).Unix(),
		Kind:        scope.OrderNew,
		Order:       &scope.Order{ClOrdID: "A-1", SecurityID: "FR0000120271", SecurityIDSource: "4", Side: "1", OrdType: "2", Price: dec("50"), OrderQty: dec("100"), Currency: "EUR", TimeInForce: "0"},
		Native:      &scope.Native{Format: scope.NativeHTTPBody, SHA256: hex.EncodeToString(sum[:])},
		Decision:    scope.Decision{Decision: scope.DecisionPermit, Certificate: sha256.Sum256(agent.Chain[0].Raw), Scope: s.scope.Hash()},
		Attestation: scope.Attestation{Evidence: "00", Time: scope.Timestamp{Time: now.Truncate(time.Second)}},
	}
	if n > 1 {
		st.Previous = scope.Digest{1}
	}
	if change != nil {
		change(st)
	}
	if p, err := scope.Check(s.scope, st.Action(), scope.Env{Now: st.Time.Time, AttestedAt: now}); err == nil {
		if amount, currency, ok := p.Notional(); ok {
			st.Decision.Notional = &scope.Amount{Amount: amount, Currency: currency}
		}
	}
	payload, err := st.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	alg, _, err := jws.Algorithm(agent.Key.Public())
	if err != nil {
		t.Fatal(err)
	}
	h, err := jws.NewHeader(alg, agent.Chain, true)
	if err != nil {
		t.Fatal(err)
	}
	input := h.SigningInput(payload)
	sig, err := jws.Sign(agent.Key, input)
	if err != nil {
		t.Fatal(err)
	}
	return jws.Compact(input, sig)
}

func cancelOf(order string) func(*scope.Statement) {
	return func(st *scope.Statement) {
		st.Kind, st.Order = scope.OrderCancel, &scope.Order{ClOrdID: "A-2", OrigClOrdID: order}
	}
}

// request makes one.
func (s *site) request(t testing.TB, ctx context.Context, method, path, action string, body io.Reader) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, method, "https://"+s.addr+path, body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	if action != "" {
		req.Header.Set(verify.Header, action)
	}
	return req
}

// send sends a request and returns status, reason and answer.
func (s *site) send(t testing.TB, c *http.Client, method, path, action string, body []byte, change func(*http.Request)) (int, string, string) {
	t.Helper()
	req := s.request(t, t.Context(), method, path, action, bytes.NewReader(body))
	if change != nil {
		change(req)
	}
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if res.Header.Get("Alt-Svc") != "" && s.log.String() != "" {
		t.Error("the backend's Alt-Svc came through")
	}
	return res.StatusCode, problem.Parse(res.StatusCode, res.Header.Get("Content-Type"), b).Reason, string(b)
}

// nothing fails the test if the backend got a request.
func (s *site) nothing(t testing.TB) {
	t.Helper()
	select {
	case r := <-s.got:
		t.Errorf("the backend got %s %s", r.Method, r.URL)
	default:
	}
}

// TestRefusals sends one wrong request each; the reason that must refuse it is
// the first word of the name.
func TestRefusals(t *testing.T) {
	type wrong struct {
		site   func(t *testing.T, s *site)
		method string // POST
		path   string // /orders
		body   string // goodBody
		action func(*scope.Statement)
		change func(*http.Request)
		status int // 403
	}
	for name, w := range map[string]wrong{
		"form no action":   {change: func(r *http.Request) { r.Header.Del(verify.Header) }, status: 400},
		"form two actions": {change: func(r *http.Request) { r.Header.Add(verify.Header, "a.b.c") }, status: 400},
		"audience":         {action: func(st *scope.Statement) { st.Audience = "XLON" }},
		"scope":            {body: strings.Replace(goodBody, "100", "501", 1), action: func(st *scope.Statement) { st.Order.OrderQty = dec("501") }},
		"body":             {action: func(st *scope.Statement) { st.Native.SHA256 = strings.Repeat("00", 32) }},
		"body too large":   {site: func(_ *testing.T, s *site) { s.config.MaxBody = 10 }, status: 413},
		"agent not listed": {site: func(_ *testing.T, s *site) {
			s.config.Agents = map[string][]netip.Prefix{"spiffe://example.org/agent/b": nil}
		}},
		"agent none listed":            {site: func(_ *testing.T, s *site) { s.config.Agents = map[string][]netip.Prefix{} }},
		"network":                      {site: func(_ *testing.T, s *site) { s.config.Agents = from("192.0.2.0/24", "::/0") }},
		"request query":                {path: "/orders?dry=1", status: 400},
		"request empty query":          {path: "/orders?", status: 400},
		"request escape":               {path: "/%6frders", status: 400},
		"request double escape":        {path: "/orders/%2565", status: 400},
		"request escaped slash":        {path: "/orders/..%2fadmin", status: 400},
		"request dots":                 {path: "/orders/../admin", status: 400},
		"request empty segment":        {path: "//orders", status: 400},
		"request end slash":            {path: "/orders/", status: 400},
		"request parameter":            {path: "/orders;x=1", status: 400},
		"request backslash":            {path: `/orders\x`, status: 400},
		"request content coding":       {change: func(r *http.Request) { r.Header.Set("Content-Encoding", "gzip") }, status: 400},
		"request another content type": {change: func(r *http.Request) { r.Header.Set("Content-Type", "text/plain") }, status: 400},
		"request another charset":      {change: func(r *http.Request) { r.Header.Set("Content-Type", "application/json; charset=utf-7") }, status: 400},
		"request two content types":    {change: func(r *http.Request) { r.Header.Add("Content-Type", "text/plain") }, status: 400},
		"request no content type":      {change: func(r *http.Request) { r.Header.Del("Content-Type") }, status: 400},
		"route another method":         {method: "PUT", status: 404},
		"route another path":           {path: "/admin", status: 404},
		"route longer path":            {path: "/orders/1/2", status: 404},
		"route another case":           {path: "/Orders", status: 404},
		"route root":                   {path: "/", status: 404},
		"kind":                         {action: cancelOf("A-1")},
		"kind to an opaque route":      {path: "/opaque", action: cancelOf("A-1")},
		"mismatch of another cancel":   {method: "DELETE", path: "/orders/A-9", body: "-", action: cancelOf("A-1")},
		"mismatch cancel with a body":  {method: "DELETE", path: "/orders/A-1", body: "x", action: cancelOf("A-1")},
		"mismatch of another quantity": {body: strings.Replace(goodBody, "100", "1000", 1)},
		"record":                       {site: func(_ *testing.T, s *site) { s.config.Record = failingRecord }, status: 503},
		"peer one key for TLS as well": {site: oneKey},
		"certificate_revoked by TLS": {site: func(_ *testing.T, s *site) {
			s.config.ClientRevocation = revokes{&verify.Refusal{Reason: verify.ReasonRevoked}}
		}, status: 401},
		"revocation_unknown of TLS": {site: func(_ *testing.T, s *site) { s.config.ClientRevocation = revokes{errors.New("no network")} }, status: 503},
		"certificate_revoked of action": {site: func(_ *testing.T, s *site) {
			s.config.ClientRevocation = verify.NoRevocation{}
			s.config.Receiver.Revocation = revokes{&verify.Refusal{Reason: verify.ReasonRevoked}}
		}, status: 401},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			cert := certificate(t, s.ca, nil)
			if w.site != nil {
				w.site(t, s)
				if k, ok := s.agent.Key.(*ecdsa.PrivateKey); ok && name == "peer one key for TLS as well" {
					cert = certificateWithKey(t, s.ca, k, nil)
				}
			}
			s.serve(t)
			method, path, body, status := "POST", "/orders", []byte(goodBody), 403
			if w.method != "" {
				method = w.method
			}
			if w.path != "" {
				path = w.path
			}
			if w.body == "-" {
				body = nil
			} else if w.body != "" {
				body = []byte(w.body)
			}
			if w.status != 0 {
				status = w.status
			}
			want, _, _ := strings.Cut(name, " ")
			got, reason, answer := s.send(t, s.client(t, cert), method, path, s.sign(t, s.agent, body, w.action), body, w.change)
			if got != status || reason != want {
				t.Errorf("got %d %q, want %d %q: %s", got, reason, status, want, answer)
			}
			s.nothing(t)
			if log := s.log.String(); !strings.Contains(log, "msg=refused") || !strings.Contains(log, "reason="+want) {
				t.Errorf("the log does not say so: %s", log)
			}
		})
	}
}

func from(networks ...string) map[string][]netip.Prefix {
	var list []netip.Prefix
	for _, n := range networks {
		list = append(list, netip.MustParsePrefix(n))
	}
	return map[string][]netip.Prefix{"spiffe://example.org/agent/a": list}
}

func failingRecord(context.Context, *verify.Verified, string) error { return errors.New("disk full") }

func oneKey(t *testing.T, s *site) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s.agent = s.ca.AgentWithKey(t, "a", s.scope.Canonical(), k, nil)
}

// revokes answers every question in one way.
type revokes struct{ err error }

func (r revokes) Check(context.Context, *x509.Certificate, *x509.Certificate, time.Time) error {
	return r.err
}

func TestReplayIsRefused(t *testing.T) {
	s := newSite(t)
	s.serve(t)
	c, action := s.good(t), s.sign(t, s.agent, []byte(goodBody), nil)
	if status, _, answer := s.send(t, c, "POST", "/orders", action, []byte(goodBody), nil); status != 200 || answer != "acknowledged" {
		t.Fatalf("%d %s", status, answer)
	}
	<-s.got
	if status, reason, _ := s.send(t, c, "POST", "/orders", action, []byte(goodBody), nil); status != 409 || reason != "replay" {
		t.Errorf("again: %d %s", status, reason)
	}
	s.nothing(t)
}

// TestPeer: an action that another agent brings is refused, and not used up.
func TestPeer(t *testing.T) {
	s := newSite(t)
	s.serve(t)
	thief := s.client(t, certificate(t, s.ca, func(c *x509.Certificate) {
		c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/agent/b"}}
	}))
	action := s.sign(t, s.agent, []byte(goodBody), nil)
	if status, reason, _ := s.send(t, thief, "POST", "/orders", action, []byte(goodBody), nil); status != 403 || reason != "peer" {
		t.Errorf("another agent's: %d %s", status, reason)
	}
	s.nothing(t)
	if status, _, answer := s.send(t, s.good(t), "POST", "/orders", action, []byte(goodBody), nil); status != 200 {
		t.Errorf("its own agent, afterwards: %d %s", status, answer)
	}
}

// TestRevocationOnALiveConnection: a connection that stands does not outlive
// its certificate.
func TestRevocationOnALiveConnection(t *testing.T) {
	s := newSite(t)
	var mu sync.Mutex
	var ids []*big.Int
	number := int64(0)
	s.config.Receiver.Revocation = &verify.CRL{MaxAge: time.Hour, Reload: time.Nanosecond, Load: func(context.Context) ([]byte, error) {
		mu.Lock()
		defer mu.Unlock()
		number++
		l := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(time.Hour)}
		for _, id := range ids {
			l.RevokedCertificateEntries = append(l.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: id, RevocationTime: time.Now()})
		}
		return x509.CreateRevocationList(rand.Reader, l, s.ca.Certificate, s.ca.Key)
	}}
	s.serve(t)
	cert := certificate(t, s.ca, nil)
	c := s.client(t, cert)
	dials := 0
	c.Transport.(*http.Transport).DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		dials++
		return new(net.Dialer).DialContext(ctx, network, address)
	}
	if status, _, answer := s.send(t, c, "POST", "/orders", s.sign(t, s.agent, []byte(goodBody), nil), []byte(goodBody), nil); status != 200 {
		t.Fatalf("%d %s", status, answer)
	}
	<-s.got
	mu.Lock()
	ids = append(ids, cert.Leaf.SerialNumber)
	mu.Unlock()
	if status, reason, _ := s.send(t, c, "POST", "/orders", s.sign(t, s.agent, []byte(goodBody), nil), []byte(goodBody), nil); status != 401 || reason != "certificate_revoked" {
		t.Errorf("after the revocation: %d %s", status, reason)
	}
	if dials != 1 {
		t.Errorf("%d connections, the test needs one", dials)
	}
	s.nothing(t)
}

// TestExpiryOnALiveConnection: nor does it outlive the certificate's time.
func TestExpiryOnALiveConnection(t *testing.T) {
	s := newSite(t)
	var mu sync.Mutex
	var ahead time.Duration
	s.config.Receiver.Now = func() time.Time {
		mu.Lock()
		defer mu.Unlock()
		return time.Now().Add(ahead)
	}
	s.serve(t)
	// Shorter than the action certificate's, which would be refused for the same reason.
	c := s.client(t, certificate(t, s.ca, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(10 * time.Minute) }))
	if status, _, answer := s.send(t, c, "POST", "/orders", s.sign(t, s.agent, []byte(goodBody), nil), []byte(goodBody), nil); status != 200 {
		t.Fatalf("%d %s", status, answer)
	}
	mu.Lock()
	ahead = 20 * time.Minute
	mu.Unlock()
	if status, reason, _ := s.send(t, c, "POST", "/orders", s.sign(t, s.agent, []byte(goodBody), nil), []byte(goodBody), nil); status != 401 || reason != "certificate_expired" {
		t.Errorf("after its time: %d %s", status, reason)
	}
}

// TestConcurrent: many agents' requests at a time, each forwarded once.
func TestConcurrent(t *testing.T) {
	s := newSite(t)
	s.serve(t)
	c := s.good(t)
	var wg sync.WaitGroup
	for range 40 {
		action := s.sign(t, s.agent, []byte(goodBody), nil)
		wg.Go(func() {
			if status, _, answer := s.send(t, c, "POST", "/orders", action, []byte(goodBody), nil); status != 200 {
				t.Errorf("%d %s", status, answer)
			}
		})
	}
	wg.Wait()
	if len(s.got) != 40 {
		t.Errorf("the backend got %d requests, want 40", len(s.got))
	}
}

func TestConfig(t *testing.T) {
	route := func(change func(*message.Route)) func(*gate.Config) {
		return func(c *gate.Config) {
			c.Routes = venueRoutes()
			change(&c.Routes[0])
		}
	}
	backend := func(u string) func(*gate.Config) {
		return func(c *gate.Config) { c.Backend, _ = url.Parse(u) }
	}
	for name, change := range map[string]func(*gate.Config){
		"no roots":                    func(c *gate.Config) { c.Receiver.Roots = nil },
		"no revocation":               func(c *gate.Config) { c.Receiver.Revocation = nil },
		"no replay store":             func(c *gate.Config) { c.Receiver.Replay = nil },
		"client roots, no revocation": func(c *gate.Config) { c.ClientRoots = x509.NewCertPool() },
		"no certificate":              func(c *gate.Config) { c.GetCertificate = nil },
		"messages of another kind":    func(c *gate.Config) { c.Receiver.Messages = c.Routes },
		"no routes":                   func(c *gate.Config) { c.Routes = nil },
		"no trust domain":             func(c *gate.Config) { c.TrustDomain = "" },
		"trust domain in capitals":    func(c *gate.Config) { c.TrustDomain = "Example.org" },
		"agent of another domain":     func(c *gate.Config) { c.Agents = map[string][]netip.Prefix{"spiffe://example.com/a": nil} },
		"negative body":               func(c *gate.Config) { c.MaxBody = -1 },
		"no backend":                  func(c *gate.Config) { c.Backend = nil },
		"backend elsewhere in plain":  backend("http://192.0.2.1:80"),
		"backend with a query":        backend("https://backend/?a"),
		"backend with a user":         backend("https://u:p@backend/"),
		"backend of another scheme":   backend("ftp://backend/"),
		"header of the gate":          func(c *gate.Config) { c.Headers = []string{"agent_id"} },
		"header that is forwarded":    func(c *gate.Config) { c.Headers = []string{"X-Forwarded-For"} },
		"header of the connection":    func(c *gate.Config) { c.Headers = []string{"upgrade"} },
		"header of content coding":    func(c *gate.Config) { c.Headers = []string{"Content-Encoding"} },
		"route without a method":      route(func(r *message.Route) { r.Method = "" }),
		"route with a small method":   route(func(r *message.Route) { r.Method = "post" }),
		"route with a relative path":  route(func(r *message.Route) { r.Path = "orders" }),
		"route with dots":             route(func(r *message.Route) { r.Path = "/a/../b" }),
		"route with an open brace":    route(func(r *message.Route) { r.Path = "/{a" }),
		"route with an empty field":   route(func(r *message.Route) { r.Path = "/{}" }),
		"route with a field twice":    route(func(r *message.Route) { r.Path = "/{id}/{id}" }),
		"route without kinds":         route(func(r *message.Route) { r.Kinds = nil }),
		"route of an unknown kind":    route(func(r *message.Route) { r.Kinds = []scope.Kind{"order.any"} }),
		"route opaque and described":  route(func(r *message.Route) { r.Opaque = true }),
		"member that says nothing":    route(func(r *message.Route) { r.Body["x"] = message.Member{} }),
		"member that says two things": route(func(r *message.Route) { r.Body["x"] = message.Member{Const: "a", Free: true} }),
		"member, values for no field": route(func(r *message.Route) { r.Body["x"] = message.Member{Free: true, Values: map[string]string{"a": "b"}} }),
	} {
		s := newSite(t)
		change(&s.config)
		if _, err := gate.New(s.config); err == nil {
			t.Errorf("%s: accepted", name)
		} else if !strings.HasPrefix(err.Error(), "gate: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, u := range []string{"https://backend:8443/base", "http://[::1]:80", "http://localhost"} {
		s := newSite(t)
		backend(u)(&s.config)
		if _, err := gate.New(s.config); err != nil {
			t.Errorf("%s: %v", u, err)
		}
	}
}
