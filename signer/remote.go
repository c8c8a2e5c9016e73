package signer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"inkan/internal/sources"
)

var errTooFast = errors.New("too many requests from this address")

// RemoteConfig lets agents on other hosts call the signer over TLS 1.3. They
// are workloads with a SPIFFE ID, shown by an X.509-SVID or, where a caller is
// configured so, by a JWT-SVID.
type RemoteConfig struct {
	Listen      string `json:"listen"`      // host:port
	Certificate string `json:"certificate"` // PEM file, leaf first; read again when it changes
	Key         string `json:"key"`         // PEM file, PKCS#8, for its owner alone
	TrustDomain string `json:"trust_domain"`
	Bundle      string `json:"bundle"`                 // the trust domain's authorities: a SPIFFE bundle (JSON) or certificates (PEM); read again when it changes
	Audience    string `json:"jwt_audience,omitempty"` // that JWT-SVIDs must name

	MaxConnections      int `json:"max_connections,omitzero"`       // in all; 512 by default
	ConnectionsPerHost  int `json:"connections_per_host,omitzero"`  // of one source address; 64 by default
	HandshakesPerSecond int `json:"handshakes_per_second,omitzero"` // of one source address; 20 by default
	RequestsPerSecond   int `json:"requests_per_second,omitzero"`   // of one source address; 2000 by default

	domain spiffeid.TrustDomain
}

func (c *RemoteConfig) validate(below func(*string)) error {
	for name, v := range map[string]string{"listen": c.Listen, "certificate": c.Certificate, "key": c.Key, "trust_domain": c.TrustDomain, "bundle": c.Bundle} {
		if v == "" {
			return fmt.Errorf("remote.%s is missing", name)
		}
	}
	var err error
	if c.domain, err = spiffeid.TrustDomainFromString(c.TrustDomain); err != nil {
		return fmt.Errorf("remote.trust_domain %.64q: a name such as example.org is expected", c.TrustDomain)
	}
	for _, p := range []*string{&c.Certificate, &c.Key, &c.Bundle} {
		below(p)
	}
	for _, n := range []struct {
		name      string
		v         *int
		ifNothing int
	}{
		{"max_connections", &c.MaxConnections, 512}, {"connections_per_host", &c.ConnectionsPerHost, 64},
		{"handshakes_per_second", &c.HandshakesPerSecond, 20}, {"requests_per_second", &c.RequestsPerSecond, 2000},
	} {
		if *n.v == 0 {
			*n.v = n.ifNothing
		}
		if *n.v < 1 || *n.v > 1_000_000 {
			return fmt.Errorf("remote.%s %d: 1 to 1000000 is expected", n.name, *n.v)
		}
	}
	return nil
}

// validateRemote checks a caller on another host.
func (c *CallerConfig) validateRemote() error {
	if c.User != "" || c.Executable != "" || c.SHA256 != "" || c.Unit != "" || c.Launcher {
		return errors.New("a caller with a spiffe_id is on another host: user, executable, unit and launcher say nothing there")
	}
	var err error
	if c.id, err = spiffeid.FromString(c.SPIFFEID); err != nil || c.id.Path() == "" {
		return fmt.Errorf("spiffe_id %.128q: an ID such as spiffe://example.org/agent/mm-07 is expected", c.SPIFFEID)
	}
	for _, n := range c.Networks {
		p, err := netip.ParsePrefix(n)
		if err != nil || p != p.Masked() {
			return fmt.Errorf("networks: %.64q: a network such as 10.1.0.0/16 is expected, with no bits set behind its length", n)
		}
		c.networks = append(c.networks, p)
	}
	if c.JWT && len(c.networks) == 0 {
		return errors.New("jwt: a token can be used by whoever sees it, so networks must say from where")
	}
	return nil
}

func within(networks []netip.Prefix, a netip.Addr) bool {
	for _, p := range networks {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// remote is the signer's service for agents on other hosts.
type remote struct {
	config  *RemoteConfig
	agents  []AgentConfig
	log     *slog.Logger
	gate    *sources.Gate
	refused *prometheus.CounterVec // connections, by why
	bundle  authorities
	server  serverCertificate
}

func newRemote(c *Config, log *slog.Logger) (*remote, error) {
	r := &remote{config: c.Remote, agents: c.Agents, log: log, gate: sources.New(sources.Limits{Connections: c.Remote.MaxConnections, ConnectionsPerHost: c.Remote.ConnectionsPerHost, HandshakesPerSecond: c.Remote.HandshakesPerSecond, RequestsPerSecond: c.Remote.RequestsPerSecond}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "inkan_signer_remote_refused_total", Help: "connections from other hosts that were turned away before their handshake"}, []string{"why"}),
		bundle:  authorities{path: c.Remote.Bundle, domain: c.Remote.domain}, server: serverCertificate{certificate: c.Remote.Certificate, key: c.Remote.Key}}
	if _, _, err := r.bundle.current(); err != nil {
		return nil, err
	}
	_, err := r.server.get(nil)
	return r, err
}

// mayCall says whether any caller could be at an address: others are turned
// away before they cost a handshake.
func (r *remote) mayCall(a netip.Addr) bool {
	for _, ag := range r.agents {
		for _, c := range ag.Callers {
			if c.SPIFFEID != "" && (len(c.networks) == 0 || within(c.networks, a)) {
				return true
			}
		}
	}
	return false
}

// listen opens the port. Connections pass the gate before their handshake.
func (r *remote) listen() (net.Listener, error) {
	l, err := net.Listen("tcp", r.config.Listen)
	if err != nil {
		return nil, fmt.Errorf("remote.listen: %w", err)
	}
	return tls.NewListener(&gatedListener{Listener: l, remote: r}, &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"http/1.1"}, GetCertificate: r.server.get,
		// The chain is verified against the trust bundle below, on every
		// handshake: there is no resumption that could skip it.
		ClientAuth: tls.RequestClientCert, SessionTicketsDisabled: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return nil // a JWT-SVID may come with each request
			}
			_, err := r.verify(s.PeerCertificates)
			return err
		},
	}), nil
}

// verify checks an X.509-SVID and returns its ID (SPIFFE X509-SVID, section 5).
func (r *remote) verify(chain []*x509.Certificate) (spiffeid.ID, error) {
	b, _, err := r.bundle.current()
	if err != nil {
		return spiffeid.ID{}, err
	}
	id, _, err := x509svid.Verify(chain, b)
	if err != nil {
		return spiffeid.ID{}, errors.New("the client's certificate is no valid X.509-SVID of the trust domain")
	}
	return id, nil
}

// remoteConn is what is known of a connection from another host.
type remoteConn struct {
	address netip.Addr
	gate    *sources.Gate

	mu       sync.Mutex
	verified int // generation of the bundle that the certificate was last verified with
	id       spiffeid.ID
}

type remoteKey struct{}

// agentOf authenticates a request (step 1): by the connection's certificate, else by a JWT-SVID.
func (r *remote) agentOf(req *http.Request, c *remoteConn) (string, error) {
	if !c.gate.Request(c.address) {
		return "", errTooFast
	}
	var id spiffeid.ID
	var byToken bool
	var err error
	token, hasToken := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer ")
	switch chain := req.TLS.PeerCertificates; {
	case len(chain) > 0 && hasToken:
		return "", errors.New("it shows a certificate and a token: one of them is expected")
	case len(chain) > 0:
		id, err = r.certificateOf(c, chain)
	case hasToken:
		id, err = r.tokenOf(token)
		byToken = true
	default:
		err = errors.New("it shows neither an X.509-SVID nor a JWT-SVID")
	}
	if err != nil {
		return "", err
	}
	for _, a := range r.agents {
		for _, x := range a.Callers {
			if x.SPIFFEID == "" || x.id != id {
				continue
			}
			switch {
			case byToken && !x.JWT:
				return "", fmt.Errorf("%s must show an X.509-SVID: its caller is not configured for tokens (jwt)", id)
			case len(x.networks) > 0 && !within(x.networks, c.address):
				return "", fmt.Errorf("%s may not call from %s", id, c.address)
			}
			return a.Name, nil
		}
	}
	return "", fmt.Errorf("no agent's callers include %s", id)
}

// certificateOf checks at every request that the certificate has not expired
// since the handshake, and verifies it anew when the trust bundle has changed.
func (r *remote) certificateOf(c *remoteConn, chain []*x509.Certificate) (spiffeid.ID, error) {
	if now := time.Now(); now.After(chain[0].NotAfter) {
		return spiffeid.ID{}, fmt.Errorf("its certificate expired at %s", chain[0].NotAfter.UTC().Format(time.RFC3339))
	}
	_, generation, err := r.bundle.current()
	if err != nil {
		return spiffeid.ID{}, &inside{"the trust domain's bundle cannot be used", err}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.verified != generation {
		if c.id, err = r.verify(chain); err != nil {
			return spiffeid.ID{}, err
		}
		c.verified = generation
	}
	return c.id, nil
}

// maxToken bounds a JWT-SVID, in bytes.
const maxToken = 8 << 10

func (r *remote) tokenOf(token string) (spiffeid.ID, error) {
	if r.config.Audience == "" {
		return spiffeid.ID{}, errors.New("it shows a token, and remote.jwt_audience is not configured")
	}
	if len(token) > maxToken {
		return spiffeid.ID{}, fmt.Errorf("its token has %d bytes, at most %d are allowed", len(token), maxToken)
	}
	b, _, err := r.bundle.current()
	if err != nil {
		return spiffeid.ID{}, &inside{"the trust domain's bundle cannot be used", err}
	}
	svid, err := jwtsvid.ParseAndValidate(token, b, []string{r.config.Audience})
	if err != nil {
		return spiffeid.ID{}, errors.New("its token is no valid JWT-SVID of the trust domain for this audience") // the cause could quote the token
	}
	return svid.ID, nil
}

// authorities is the trust domain's bundle, read again when its file changes.
type authorities struct {
	path   string
	domain spiffeid.TrustDomain

	mu         sync.Mutex
	file       fileVersion
	bundle     *spiffebundle.Bundle
	generation int
}

// current returns the bundle and a number that changes with it. A file that
// cannot be read any more ends refused.
func (a *authorities) current() (*spiffebundle.Bundle, int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	v, err := versionOf(a.path)
	if err != nil {
		return nil, 0, fmt.Errorf("remote.bundle: %w", err)
	}
	if a.bundle != nil && v == a.file {
		return a.bundle, a.generation, nil
	}
	b, err := a.read()
	if err != nil {
		a.bundle = nil
		return nil, 0, fmt.Errorf("remote.bundle %s: %w", a.path, err)
	}
	a.bundle, a.file = b, v
	a.generation++
	return b, a.generation, nil
}

func (a *authorities) read() (*spiffebundle.Bundle, error) {
	b, err := os.ReadFile(a.path)
	if err != nil {
		return nil, err
	}
	if len(b) > maxConfig {
		return nil, fmt.Errorf("%d bytes, at most %d are allowed", len(b), maxConfig)
	}
	if strings.HasPrefix(strings.TrimSpace(string(b)), "{") {
		bundle, err := spiffebundle.Parse(a.domain, b)
		if err != nil {
			return nil, errors.New("a SPIFFE bundle is expected: a JWK set with the uses x509-svid and jwt-svid")
		}
		return bundle, nil
	}
	x, err := x509bundle.Parse(a.domain, b)
	if err != nil || x.Empty() {
		return nil, errors.New("a SPIFFE bundle in JSON, or certificates in PEM are expected")
	}
	return spiffebundle.FromX509Bundle(x), nil
}

// serverCertificate is the signer's own, read again when its file changes.
type serverCertificate struct {
	certificate, key string

	mu   sync.Mutex
	file fileVersion
	pair *tls.Certificate
}

func (s *serverCertificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := versionOf(s.certificate)
	if err == nil && s.pair != nil && v == s.file {
		return s.pair, nil
	}
	if err != nil {
		return nil, fmt.Errorf("remote.certificate: %w", err)
	}
	fi, err := os.Stat(s.key)
	if err != nil {
		return nil, fmt.Errorf("remote.key: %w", err)
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("remote.key %s: others may read it (mode %04o): chmod 600", s.key, fi.Mode().Perm())
	}
	pair, err := tls.LoadX509KeyPair(s.certificate, s.key)
	if err != nil {
		return nil, fmt.Errorf("remote.certificate and remote.key: %w", err)
	}
	s.pair, s.file = &pair, v
	return s.pair, nil
}

// fileVersion tells one content of a file from the next: times alone do not,
// where two come within one tick of the clock.
type fileVersion struct {
	modified time.Time
	size     int64
	inode    uint64
}

func versionOf(path string) (fileVersion, error) {
	fi, err := os.Stat(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%s does not exist", path)
		}
		return fileVersion{}, err
	}
	v := fileVersion{modified: fi.ModTime(), size: fi.Size()}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		v.inode = st.Ino
	}
	return v, nil
}

// gatedListener turns away whom the gate does not let in, before a handshake.
type gatedListener struct {
	net.Listener
	remote *remote
}

// gatedConn gives its place back once, when it is closed.
type gatedConn struct {
	net.Conn
	info *remoteConn
	once sync.Once
}

func (c *gatedConn) Close() error {
	c.once.Do(func() { c.info.gate.Leave(c.info.address) })
	return c.Conn.Close()
}

func (l *gatedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		at, err := netip.ParseAddrPort(c.RemoteAddr().String())
		address := at.Addr().Unmap().WithZone("")
		switch {
		case err != nil:
		case !l.remote.mayCall(address):
			l.remote.refused.WithLabelValues("network").Inc()
		case l.remote.gate.Enter(address):
			return &gatedConn{Conn: c, info: &remoteConn{address: address, gate: l.remote.gate}}, nil
		default:
			l.remote.refused.WithLabelValues("rate").Inc()
		}
		_ = c.Close() // it was never used
	}
}

// withRemote marks a request's context as one from another host.
func withRemote(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, remoteKey{}, c.(*tls.Conn).NetConn().(*gatedConn).info)
}
