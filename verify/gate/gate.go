// Package gate is a reverse proxy for venues that will not change code: [New]
// makes a [Gate], [Gate.Serve] runs it in front of the venue's own HTTP server.
//
// It terminates mutual TLS, checks the client's certificate and SPIFFE ID, lets
// a [verify.Receiver] check the signed action, compares the message with the
// action, and forwards the request with headers that say who acted and under
// which scope. Everything else is refused with a problem document (RFC 9457)
// whose reason is one of [Reasons] or of [verify.Reasons].
//
// The backend believes those headers, so nobody but the gate may reach it.
//
// A request line is not signed. So only the requests that a [message.Route] describes
// pass, without a query, and only the headers that are listed. The gate sees the
// address of its TCP peer: put nothing that replaces addresses in front of it
// if source networks are to count.
package gate

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"sync"
	"time"

	"inkan/verify"
	"inkan/verify/message"
)

// Config says whom a gate lets through, and to where.
type Config struct {
	// Receiver checks the signed actions. New makes the receiver, since it binds
	// actions to the TLS peer before one is used up.
	Receiver verify.Config
	// Routes are the requests that pass; the first that matches counts.
	Routes message.Routes
	// MaxBody bounds a request's body, in bytes; 64 KiB by default.
	MaxBody int64
	// Record, if not nil, keeps an accepted action before it is forwarded; if it
	// fails nothing is forwarded. compact is the JWS.
	Record func(ctx context.Context, v *verify.Verified, compact string) error

	// GetCertificate returns the gate's own certificate, as of tls.Config.
	GetCertificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	// TrustDomain of the clients' SPIFFE IDs, such as example.org.
	TrustDomain string
	// ClientRoots are for TLS client certificates; Receiver.Roots by default. Where
	// they are set ClientRevocation must be set too.
	ClientRoots *x509.CertPool
	// ClientRevocation is for TLS client certificates; Receiver.Revocation by default.
	ClientRevocation verify.Revocation
	// Agents, if not nil, are the SPIFFE IDs that may come, each with the networks
	// it may come from; without networks it may come from anywhere.
	Agents map[string][]netip.Prefix

	// Backend is where requests go: https, or http to a loopback address.
	Backend *url.URL
	// PlainBackend allows http to other addresses: whoever is between gate and
	// backend can then act as any agent.
	PlainBackend bool
	// BackendTimeout bounds the backend's whole answer; 30 s by default.
	BackendTimeout time.Duration
	// Transport goes to the backend. The default uses no proxy and trusts the
	// system's roots; set one to show the backend a client certificate.
	Transport http.RoundTripper
	// Headers are names of request headers that pass besides DefaultHeaders.
	Headers []string
	// ForwardScope adds the header Agent-Scope with the scope's whole text.
	ForwardScope bool
	// ForwardAction passes the header Agent-Action with the JWS on, for a backend that
	// keeps it; it takes some kilobytes.
	ForwardAction bool

	// Limits bound connections and requests before they are checked.
	Limits Limits

	// Log gets a line for each request; nil is silence.
	Log *slog.Logger
}

// Gate is an http.Handler for connections of [Gate.TLSConfig]. It is safe for
// concurrent use.
type Gate struct {
	c       Config
	now     func() time.Time
	headers []string
	checked http.Handler // receiver, then accepted
	proxy   *httputil.ReverseProxy
	log     *slog.Logger
	limiter *limiter
	metrics *metrics
}

// New checks a configuration and makes a gate of it.
func New(c Config) (*Gate, error) {
	if err := c.complete(); err != nil {
		return nil, fmt.Errorf("gate: %w", err)
	}
	g := &Gate{c: c, now: c.Receiver.Now, log: c.Log, limiter: newLimiter(c.Limits), metrics: newMetrics()}
	if g.now == nil {
		g.now = time.Now
	}
	if g.log == nil {
		g.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if g.headers, err = passing(c.Headers); err != nil {
		return nil, fmt.Errorf("gate: %w", err)
	}
	if c.ForwardAction {
		g.headers = append(g.headers, verify.Header)
	}
	bound := c.Receiver
	bound.Messages = c.Routes
	bound.Revocation = peerBound{c.Receiver.Revocation}
	bound.Refused = func(req *http.Request, err error) {
		if x := exchangeOf(req.Context()); x != nil {
			x.refused = err
		}
		if c.Receiver.Refused != nil {
			c.Receiver.Refused(req, err)
		}
	}
	receiver, err := verify.NewReceiver(bound)
	if err != nil {
		return nil, fmt.Errorf("gate: %w", err)
	}
	g.checked = receiver.Middleware(c.MaxBody, http.HandlerFunc(g.accepted))
	g.proxy = g.reverseProxy()
	return g, nil
}

func (c *Config) complete() error {
	if c.MaxBody == 0 {
		c.MaxBody = 64 << 10
	}
	if c.BackendTimeout == 0 {
		c.BackendTimeout = 30 * time.Second
	}
	if c.ClientRoots == nil {
		c.ClientRoots = c.Receiver.Roots
	} else if c.ClientRevocation == nil {
		return errors.New("ClientRoots is set and ClientRevocation is not")
	}
	if c.ClientRevocation == nil {
		c.ClientRevocation = c.Receiver.Revocation
	}
	switch {
	case c.MaxBody < 0 || c.BackendTimeout < 0:
		return errors.New("MaxBody and BackendTimeout must not be negative")
	case c.Receiver.Roots == nil:
		return errors.New("Receiver.Roots is missing")
	case c.Receiver.Revocation == nil:
		return errors.New("Receiver.Revocation is missing: use verify.NoRevocation to go without")
	case c.GetCertificate == nil:
		return errors.New("GetCertificate is missing")
	case c.Receiver.Messages != nil:
		return errors.New("Receiver.Messages is set: Routes are what a gate compares messages by")
	case c.Receiver.Forwarding != nil:
		return errors.New("Receiver.Forwarding is set: the TLS client of a gate is the agent itself, so no proxy can stand between")
	case len(c.Routes) == 0:
		return errors.New("no route is given: nothing would pass")
	}
	for i := range c.Routes {
		if err := c.Routes[i].Validate(); err != nil {
			return fmt.Errorf("route %s %s: %w", c.Routes[i].Method, c.Routes[i].Path, err)
		}
	}
	if err := validDomain(c.TrustDomain); err != nil {
		return err
	}
	for id := range c.Agents {
		if err := validID(id, c.TrustDomain); err != nil {
			return fmt.Errorf("config of agents: %w", err)
		}
	}
	return validBackend(c.Backend, c.PlainBackend)
}

// exchange is what a gate knows about one request.
type exchange struct {
	peer      *client
	compact   string
	forwarded bool
	refused   error  // why there is no answer of the backend; for the log, with its cause
	checked   func() // gives back the place for checking
}

type exchangeKey struct{}

func exchangeOf(ctx context.Context) *exchange {
	x, _ := ctx.Value(exchangeKey{}).(*exchange)
	return x
}

// ServeHTTP implements http.Handler.
func (g *Gate) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	x := &exchange{}
	out := &response{ResponseWriter: w}
	defer g.report(req, x, out, time.Now()) // also when the proxy aborts

	// 0. Not more than it may send: before anything that costs more than to say so.
	busy := func(err error) {
		out.Header().Set("Retry-After", "1")
		x.answer(out, err)
	}
	if err := g.limiter.address(req); err != nil {
		busy(err)
		return
	}
	if err := g.limiter.take(); err != nil {
		busy(err)
		return
	}
	checking := sync.OnceFunc(g.limiter.give)
	defer checking()
	x.checked = checking

	// 1. The client's certificate, again at each request: a connection outlives
	// a revocation.
	var err error
	if x.peer, err = g.peer(req); err != nil {
		x.answer(out, err)
		return
	}
	// 2. May it come, and from there?
	if err := g.admit(x.peer); err != nil {
		x.answer(out, err)
		return
	}
	// Only now is it the agent's: what is refused before takes nothing of its share.
	if err := g.limiter.agent(x.peer.ID); err != nil {
		busy(err)
		return
	}
	if req.ContentLength != 0 {
		if err := g.limiter.takeBody(x.peer.ID); err != nil {
			busy(err)
			return
		}
		read := sync.OnceFunc(func() { g.limiter.giveBody(x.peer.ID) })
		defer read()
		req.Body = &arriving{req.Body, g.limiter, read}
	}
	// 3. The request and the signed action. The context carries the peer to peerBound.
	x.compact = req.Header.Get(verify.Header)
	g.checked.ServeHTTP(out, req.WithContext(context.WithValue(req.Context(), exchangeKey{}, x)))
}

// accepted goes on with a request whose action the receiver accepted. A refusal
// from here on costs the agent its action: it is the agent's own contradiction,
// since nobody else can bring the action here.
func (g *Gate) accepted(w http.ResponseWriter, req *http.Request) {
	x := exchangeOf(req.Context())
	v, ok := verify.FromContext(req.Context())
	if !ok || x == nil {
		new(exchange).answer(w, errors.New("no action was accepted")) // cannot be: the receiver calls this
		return
	}
	// 4. Kept before it is acted on.
	if g.c.Record != nil {
		if err := g.c.Record(req.Context(), v, x.compact); err != nil {
			x.answer(w, &verify.Refusal{Reason: ReasonRecord, Detail: "the action could not be recorded, so it was not forwarded; it is used up: sign another", Cause: err})
			return
		}
	}
	// 5. Forwarded. The action is used up, so it goes to the backend even if the
	// client does not wait for the answer.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(req.Context()), g.c.BackendTimeout)
	defer cancel()
	x.forwarded = true
	x.checked() // the backend may take its time
	g.proxy.ServeHTTP(w, req.WithContext(ctx))
}
