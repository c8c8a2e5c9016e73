package wire

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync/atomic"
	"time"

	"inkan/internal/httpsig"
	"inkan/scope"
)

// Bounds of a connection's beginning.
const (
	dialTimeout      = 10 * time.Second
	handshakeTimeout = 15 * time.Second // a TPM behind a queue takes its time
)

// Dialer connects as an agent to servers whose certificates chain to some roots.
type Dialer struct {
	identity *Identity
	servers  *x509.CertPool
	net      net.Dialer
}

// Dialer returns one. servers are what servers' certificates chain to; nil
// trusts nobody.
func (i *Identity) Dialer(servers *x509.CertPool) *Dialer {
	if servers == nil {
		servers = x509.NewCertPool()
	}
	// Names are resolved over TCP, so that a sandbox need not allow UDP.
	resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, address string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", address)
	}}
	d := &Dialer{identity: i, servers: servers, net: net.Dialer{Timeout: dialTimeout, Resolver: resolver}}
	d.net.SetMultipathTCP(false)
	return d
}

// Destination returns the destination with this host and port, if the scope in
// the agent's certificate names it. Its error is a *scope.Refusal.
func (d *Dialer) Destination(host string, port uint16) (scope.Destination, error) {
	g, err := d.identity.valid()
	if err != nil {
		return scope.Destination{}, err
	}
	to, refusal := g.scope.Destination(host, port)
	if refusal != nil {
		return to, refusal
	}
	return to, nil
}

// Dial connects to a destination over TLS 1.3, mutually. protocol is offered by
// ALPN, if it is not empty. What is refused is a *scope.Refusal.
func (d *Dialer) Dial(ctx context.Context, host string, port uint16, protocol string) (*tls.Conn, error) {
	to, err := d.Destination(host, port)
	if err != nil {
		return nil, err
	}
	g, err := d.identity.valid()
	if err != nil {
		return nil, err
	}
	config := g.config.Clone()
	config.RootCAs, config.ServerName = d.servers, to.Name()
	var unsigned error // of the device
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return d.identity.certificate(&unsigned) }
	if protocol != "" {
		config.NextProtos = []string{protocol}
	}
	raw, err := d.net.DialContext(ctx, "tcp", to.Address())
	if err != nil {
		return nil, failed(RuleUnreachable, err, "there is no connection to %s: its server, or the way to it, is down", to.Address())
	}
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	c := tls.Client(raw, config)
	if err := c.HandshakeContext(ctx); err != nil {
		_ = raw.Close() // nothing was sent
		if unsigned != nil {
			return nil, failed(RuleDevice, unsigned, "the device did not sign the handshake; the host's log says why")
		}
		return nil, Explain(err)
	}
	return c, nil
}

// Explain gives an error of a TLS connection its rule: a *scope.Refusal.
func Explain(err error) error {
	if r, ok := errors.AsType[*scope.Refusal](err); ok {
		return r
	}
	var alert tls.AlertError
	if e, ok := errors.AsType[*net.OpError](err); ok && e.Op == "remote error" || errors.As(err, &alert) {
		return failed(RuleTLS, err, "the server ends the connection, for instance since it does not accept the agent's certificate: %s", said(err))
	}
	if e, ok := errors.AsType[*net.OpError](err); ok && e.Op != "local error" {
		return failed(RuleUnreachable, err, "the connection to the server broke; whether it got the request is not known")
	}
	if e, ok := errors.AsType[*tls.CertificateVerificationError](err); ok { // it says what the server showed
		return failed(RuleTLS, err, "the server's certificate: %v", e.Err)
	}
	return failed(RuleTLS, err, "the server does not speak as it must; the host's log says how")
}

// said is the alert that a server ended a connection with, and nothing else of err.
func said(err error) string {
	if e, ok := errors.AsType[*net.OpError](err); ok {
		return e.Err.Error()
	}
	var alert tls.AlertError
	errors.As(err, &alert)
	return alert.Error()
}

// configOf makes what all connections of one generation share.
func (i *Identity) configOf(g *generation) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		ClientSessionCache: &sessions{i.sessions, strconv.FormatUint(g.n, 10) + " "},
		Time:               i.now,
		// At each full handshake: by now the certificate may have ended, or there is a newer one.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return i.certificate(nil) },
	}
}

// certificate returns the current one. Where the device does not sign with it, failed says why.
func (i *Identity) certificate(failed *error) (*tls.Certificate, error) {
	g, err := i.valid()
	if err != nil {
		return nil, err
	}
	c := g.certificate
	c.PrivateKey = &counted{g.certificate.PrivateKey.(crypto.Signer), &i.signed, failed}
	return &c, nil
}

// sessions keeps a session with the certificate that it began under: one that
// is resumed has the old certificate, so after a renewal none is.
type sessions struct {
	cache  tls.ClientSessionCache
	prefix string
}

// Get implements tls.ClientSessionCache.
func (s *sessions) Get(key string) (*tls.ClientSessionState, bool) {
	return s.cache.Get(s.prefix + key)
}

// Put implements tls.ClientSessionCache.
func (s *sessions) Put(key string, state *tls.ClientSessionState) { s.cache.Put(s.prefix+key, state) }

// TLSConfig returns a configuration for other libraries: TLS 1.3 with the agent's
// certificate, current at each handshake, and servers that chain to the pool. It
// does not know the scope's destinations; [Dialer.Dial] does.
func (i *Identity) TLSConfig(servers *x509.CertPool) *tls.Config {
	c := i.current.Load().config.Clone()
	c.RootCAs = servers
	if servers == nil {
		c.RootCAs = x509.NewCertPool()
	}
	// A session that is resumed has the certificate that it began with, and this configuration outlives that.
	c.ClientSessionCache = nil
	return c
}

// Client returns an HTTP client: see [Dialer.Transport].
func (i *Identity) Client(servers *x509.CertPool) *http.Client {
	return &http.Client{Transport: i.Dialer(servers).Transport(64)}
}

// Transport speaks HTTP/1.1 to destinations of the scope. It keeps at most idle connections
// for each of them. After a renewal new requests go over new connections, and those
// under way end on their own. A URL without a port means 443; http is refused.
func (d *Dialer) Transport(idle int) *Transport { return &Transport{dialer: d, idle: idle} }

// Transport is an http.RoundTripper.
type Transport struct {
	// SignRequests has the device sign each request that carries an action (RFC 9421;
	// docs/protocol.md). Set it before the first request.
	SignRequests bool

	dialer *Dialer
	idle   int
	now    atomic.Pointer[transport]
}

// transport has the connections of one generation of certificates.
type transport struct {
	n uint64
	*http.Transport
}

// RoundTrip implements http.RoundTripper. What is refused is a *scope.Refusal, wrapped or not.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	host, port, err := HostPort(req.URL.Host)
	if err == nil && req.URL.Scheme != "https" {
		err = fmt.Errorf("%s is not https", req.URL.Scheme)
	}
	if err == nil {
		_, err = t.dialer.Destination(host, port) // also for a connection that is open
	}
	if err != nil {
		if req.Body != nil {
			_ = req.Body.Close() // as a RoundTripper must
		}
		return nil, err
	}
	if t.SignRequests && len(req.Header.Values(httpsig.AgentAction)) > 0 {
		if req, err = t.dialer.identity.sign(req); err != nil {
			return nil, err
		}
	}
	res, err := t.current().RoundTrip(req)
	if err != nil {
		return nil, Explain(err)
	}
	return res, nil
}

// CloseIdleConnections is for http.Client.
func (t *Transport) CloseIdleConnections() {
	if c := t.now.Load(); c != nil {
		c.CloseIdleConnections()
	}
}

func (t *Transport) current() *transport {
	for {
		n, c := t.dialer.identity.current.Load().n, t.now.Load()
		if c != nil && c.n == n {
			return c
		}
		next := &transport{n, &http.Transport{
			DialTLSContext: func(ctx context.Context, _, address string) (net.Conn, error) {
				host, port, err := HostPort(address)
				if err != nil {
					return nil, err
				}
				return t.dialer.Dial(ctx, host, port, "http/1.1")
			},
			DisableCompression: true, MaxIdleConns: 0, MaxIdleConnsPerHost: t.idle, IdleConnTimeout: 90 * time.Second, MaxResponseHeaderBytes: 64 << 10,
			ReadBufferSize: 16 << 10, WriteBufferSize: 16 << 10,
		}}
		if t.now.CompareAndSwap(c, next) && c != nil {
			// Those in use close by IdleConnTimeout after their request, and are not used again.
			c.CloseIdleConnections()
		}
	}
}

// HostPort splits the host of a URL; without a port it is 443.
func HostPort(s string) (host string, port uint16, err error) {
	bad := refuse(scope.RuleDestinations, "%.128q is not a host and a port", s)
	host, text, err := net.SplitHostPort(s)
	if err != nil {
		if host, text, err = net.SplitHostPort(s + ":443"); err != nil {
			return "", 0, bad
		}
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 || host == "" || strconv.FormatUint(n, 10) != text {
		return "", 0, bad
	}
	if a, err := netip.ParseAddr(host); err == nil {
		host = a.String()
	}
	return host, uint16(n), nil
}
