package main

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"inkan/confine"
	"inkan/hsm"
	"inkan/internal/keyuri"
	"inkan/internal/postgres"
	"inkan/internal/strictjson"
	"inkan/verify"
	"inkan/verify/gate"
	"inkan/verify/message"
	"inkan/verify/source"
	"inkan/wire/proxy"
)

// gateConfig is a gate's configuration file.
type gateConfig struct {
	Listen           string              `json:"listen"`                            // host:port
	Certificate      string              `json:"certificate"`                       // PEM file, leaf first; read anew at each handshake
	Key              string              `json:"key"`                               // PEM file, or URI of a key in a device: tpm: or pkcs11:
	CA               string              `json:"ca"`                                // PEM file with the issuer's CA certificate
	TrustDomain      string              `json:"trust_domain"`                      // of the agents' SPIFFE IDs
	Audience         []string            `json:"audience"`                          // who this venue is
	CRL              string              `json:"crl_url"`                           // the issuer's revocation list
	MaxRevocationAge string              `json:"max_revocation_age,omitempty"`      // 1h by default
	RevocationReload string              `json:"revocation_reload,omitempty"`       // after what time the list is got again; a tenth of the above by default
	ReplayDB         string              `json:"replay_db"`                         // file that remembers what was accepted, or URL of a PostgreSQL database that several gates share
	ReplayPassword   string              `json:"replay_db_password_file,omitempty"` // file with the password of the database's user
	Backend          string              `json:"backend"`                           // https URL, or http to a loopback address
	Routes           string              `json:"routes"`                            // YAML file
	Regions          string              `json:"regions,omitempty"`                 // geofeed or MMDB file, for scopes with source_regions; read anew when it changes
	RequestSignature string              `json:"request_signature,omitempty"`       // checked, if it is there, or required (RFC 9421); not looked at by default
	Agents           map[string][]string `json:"agents,omitempty"`                  // SPIFFE IDs and the networks they come from; without it every agent of the CA may come
	Policies         string              `json:"policies,omitempty"`                // directory with policies, or base URL: docs/controls.md; without it actions under a policy are refused
	Kills            string              `json:"kills_url,omitempty"`               // the issuer's kill list; without it nobody is asked
	MaxKillAge       string              `json:"max_kill_age,omitempty"`            // 1m by default
	Limits           gateLimits          `json:"limits,omitzero"`
	MetricsListen    string              `json:"metrics_listen,omitempty"` // host:port of metrics and health; empty: none
	Sandbox          proxy.Sandbox       `json:"sandbox,omitzero"`         // what the process keeps beyond what the rest shows it to need

	signer crypto.Signer // the key, where it is in a device
	closer io.Closer
}

// gateLimits are gate.Limits in a configuration file; 0 is the default.
type gateLimits struct {
	Connections             int `json:"connections,omitzero"`
	ConnectionsPerHost      int `json:"connections_per_host,omitzero"`
	HandshakesPerSecond     int `json:"handshakes_per_second,omitzero"`
	RequestsPerSecond       int `json:"requests_per_second,omitzero"`
	AgentRequestsPerSecond  int `json:"agent_requests_per_second,omitzero"`
	ConcurrentVerifications int `json:"concurrent_verifications,omitzero"`
}

func gateCommand(e *env) *cli.Command {
	config := []cli.Flag{&cli.StringFlag{Name: "config", Value: "/etc/inkan/gate.yaml", Usage: "configuration `FILE`"}}
	return &cli.Command{
		Name:  "gate",
		Usage: "stand before a venue's HTTP server and let through only what an agent signed",
		Subcommands: []*cli.Command{
			{Name: "serve", Usage: "serve until interrupted", Flags: config, Action: func(c *cli.Context) error { return gateServe(e, c) }},
			{Name: "check", Usage: "check a configuration file and its routes", Flags: append([]cli.Flag{jsonFlag()}, config...), Action: func(c *cli.Context) error {
				g, err := readGate(e, c, true)
				if err != nil {
					return err
				}
				return errors.Join(g.close(), e.valid(c))
			}},
		},
	}
}

// openGate is a gate with its store and its key.
type openGate struct {
	*gate.Gate
	config *gateConfig
	store  *verify.SQLStore
	log    *slog.Logger
}

func (g *openGate) close() error {
	var err error
	if g.store != nil {
		err = g.store.Close()
	}
	if g.config.closer != nil {
		err = errors.Join(err, g.config.closer.Close())
	}
	return err
}

// readGate makes a gate of the configuration file, to be closed; without a store
// if it is only to be checked.
func readGate(e *env, c *cli.Context, check bool) (*openGate, error) {
	path, err := filepath.Abs(c.String("config"))
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var f gateConfig
	if err := strictjson.UnmarshalYAML(b, 256<<10, &f); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for name, v := range map[string]string{"listen": f.Listen, "certificate": f.Certificate, "key": f.Key, "ca": f.CA, "crl_url": f.CRL, "replay_db": f.ReplayDB, "backend": f.Backend, "routes": f.Routes} {
		if v == "" {
			return nil, fmt.Errorf("%s: %s is missing", path, name)
		}
	}
	if !f.inDevice() && !filepath.IsAbs(f.Key) {
		f.Key = filepath.Join(filepath.Dir(path), f.Key)
	}
	for _, p := range []*string{&f.Certificate, &f.CA, &f.Routes, &f.Regions} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(filepath.Dir(path), *p)
		}
	}
	if f.Policies != "" && !strings.Contains(f.Policies, "://") && !filepath.IsAbs(f.Policies) {
		f.Policies = filepath.Join(filepath.Dir(path), f.Policies)
	}
	config, err := f.gate()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	g := &openGate{config: &f, log: logger(e)}
	config.Log = g.log
	if check {
		err = checkReplay(c.Context, "replay_db", f.ReplayDB, f.ReplayPassword, filepath.Dir(path))
		config.Receiver.Replay = verify.NewMemoryStore(1, time.Now())
	} else if g.store, err = openReplay(c.Context, "replay_db", f.ReplayDB, f.ReplayPassword, filepath.Dir(path)); err == nil {
		config.Receiver.Replay = g.store
	}
	if err == nil {
		g.Gate, err = gate.New(*config)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), g.close())
	}
	return g, nil
}

// inDevice: the key is named by a URI, and not by a path.
func (f *gateConfig) inDevice() bool {
	return strings.HasPrefix(f.Key, "tpm:") || strings.HasPrefix(f.Key, "pkcs11:")
}

// certificate reads the gate's own certificate, with its key.
func (f *gateConfig) certificate() (*tls.Certificate, error) {
	if !f.inDevice() {
		pair, err := tls.LoadX509KeyPair(f.Certificate, f.Key)
		return &pair, err
	}
	b, err := os.ReadFile(f.Certificate)
	if err != nil {
		return nil, err
	}
	out := &tls.Certificate{PrivateKey: f.signer}
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		out.Certificate = append(out.Certificate, block.Bytes)
	}
	if len(out.Certificate) == 0 {
		return nil, fmt.Errorf("%s has no certificate in PEM", f.Certificate)
	}
	if out.Leaf, err = x509.ParseCertificate(out.Certificate[0]); err != nil {
		return nil, fmt.Errorf("%s: %w", f.Certificate, err)
	}
	if k, ok := f.signer.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !k.Equal(out.Leaf.PublicKey) {
		return nil, fmt.Errorf("%s is not for the key", f.Certificate)
	}
	return out, nil
}

func (f *gateConfig) gate() (*gate.Config, error) {
	age, reload, killAge := time.Hour, time.Duration(0), time.Minute
	for _, d := range []struct {
		name, text string
		to         *time.Duration
	}{{"max_revocation_age", f.MaxRevocationAge, &age}, {"revocation_reload", f.RevocationReload, &reload}, {"max_kill_age", f.MaxKillAge, &killAge}} {
		if d.text == "" {
			continue
		}
		v, err := time.ParseDuration(d.text)
		if err != nil || v <= 0 {
			return nil, fmt.Errorf("%s %.32q: a duration such as 1h is expected", d.name, d.text)
		}
		*d.to = v
	}
	roots, err := readPool(f.CA)
	if err != nil {
		return nil, err
	}
	if f.inDevice() {
		if f.signer, f.closer, err = keyuri.Open(f.Key); err != nil {
			return nil, err
		}
	} else if fi, err := os.Stat(f.Key); err != nil {
		return nil, err
	} else if fi.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("key %s: others may read it (mode %04o): chmod 600", f.Key, fi.Mode().Perm())
	}
	if _, err := f.certificate(); err != nil {
		return nil, err
	}
	backend, err := url.Parse(f.Backend)
	if err != nil {
		return nil, fmt.Errorf("backend: %w", err)
	}
	text, err := os.ReadFile(f.Routes)
	if err != nil {
		return nil, err
	}
	routes, err := message.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Routes, err)
	}
	config := &gate.Config{
		Receiver: verify.Config{Audiences: f.Audience, Roots: roots, Revocation: &verify.CRL{Load: verify.HTTPLoader(f.CRL), MaxAge: age, Reload: reload}},
		Routes:   routes, TrustDomain: f.TrustDomain, Backend: backend,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return f.certificate() },
		Limits:         gate.Limits(f.Limits),
	}
	switch f.RequestSignature {
	case "":
	case "checked", "required":
		config.Receiver.RequestSignature = &verify.RequestSignature{Key: verify.PeerKey, Required: f.RequestSignature == "required"}
	default:
		return nil, fmt.Errorf("request_signature %.16q: checked or required is expected", f.RequestSignature)
	}
	config.Receiver.Policies = policySource(f.Policies)
	if f.Kills != "" {
		config.Receiver.Kills = &verify.KillList{Load: verify.HTTPLoader(f.Kills), MaxAge: killAge}
	}
	if f.Regions != "" {
		if config.Receiver.Regions, err = source.Open(f.Regions); err != nil {
			return nil, fmt.Errorf("regions: %w", err)
		}
	}
	if f.Agents == nil {
		return config, nil
	}
	config.Agents = make(map[string][]netip.Prefix)
	for id, networks := range f.Agents {
		config.Agents[id] = nil
		for _, n := range networks {
			p, err := netip.ParsePrefix(n)
			if err != nil {
				return nil, fmt.Errorf("agents: %s: network %.64q: a prefix such as 192.0.2.0/24 is expected", id, n)
			}
			config.Agents[id] = append(config.Agents[id], p)
		}
	}
	return config, nil
}

// policySource is where policies are: a directory, or below a base URL; nil: nowhere.
func policySource(at string) verify.Policies {
	switch {
	case strings.HasPrefix(at, "https://"), strings.HasPrefix(at, "http://"):
		return verify.PolicyURL(at)
	case at != "":
		return &verify.PolicyDir{Path: at}
	}
	return nil
}

// confine leaves the process what it needs from here on.
func (g *openGate) confine(dir string) error {
	f := g.config
	var s sandbox
	s.room = confine.Room{Read: slices.Clone(f.Sandbox.Read), Write: slices.Clone(f.Sandbox.Write), Unix: slices.Clone(f.Sandbox.Unix), Ports: slices.Clone(f.Sandbox.Ports)}
	for _, part := range f.Sandbox.Optional {
		s.room.Optional = append(s.room.Optional, confine.Part(part))
	}
	// Files that are replaced as a whole are found by their directories.
	s.room.Read = append(s.room.Read, filepath.Dir(f.Certificate))
	s.room.Read = append(s.room.Read, existing("/etc/ssl", "/usr/share/ca-certificates", "/usr/local/share/ca-certificates")...) // for a backend by https
	if f.Regions != "" {
		s.room.Read = append(s.room.Read, filepath.Dir(f.Regions))
	}
	if !f.inDevice() {
		s.room.Read = append(s.room.Read, filepath.Dir(f.Key))
	} else if err := s.mayUseKey(f.Key); err != nil {
		return err
	}
	urls := []string{f.CRL, f.Backend}
	if postgres.IsURL(f.ReplayDB) {
		urls = append(urls, f.ReplayDB)
		if err := s.mayLogIn(f.ReplayDB); err != nil {
			return err
		}
		if f.ReplayPassword != "" {
			s.room.Read = append(s.room.Read, filepath.Dir(absolute(dir, f.ReplayPassword)))
		}
	} else {
		s.room.Write = append(s.room.Write, filepath.Dir(absolute(dir, f.ReplayDB)))
	}
	if f.Kills != "" {
		urls = append(urls, f.Kills)
	}
	if strings.Contains(f.Policies, "://") {
		urls = append(urls, f.Policies)
	} else if f.Policies != "" {
		s.room.Read = append(s.room.Read, f.Policies)
	}
	for _, text := range urls {
		if err := s.mayReach(text); err != nil {
			return err
		}
	}
	if t, ok := f.closer.(*hsm.Token); ok {
		t.EndWorker()
		defer func() { _ = t.StartWorker() }() // the next handshake says why, if it does not start
	}
	return s.enter(g.log)
}

func absolute(dir, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

func gateServe(e *env, c *cli.Context) error {
	g, err := readGate(e, c, false)
	if err != nil {
		return err
	}
	path, err := filepath.Abs(c.String("config"))
	if err != nil {
		return errors.Join(err, g.close())
	}
	l, err := net.Listen("tcp", g.config.Listen)
	if err != nil {
		return errors.Join(fmt.Errorf("listen: %w", err), g.close())
	}
	var watched net.Listener
	if g.config.MetricsListen != "" {
		if watched, err = net.Listen("tcp", g.config.MetricsListen); err != nil {
			return errors.Join(fmt.Errorf("metrics_listen: %w", err), l.Close(), g.close())
		}
	}
	systemd := newNotifier()
	if err := g.confine(filepath.Dir(path)); err != nil {
		return errors.Join(err, l.Close(), g.close())
	}
	addresses := map[string]string{"address": l.Addr().String()}
	if watched != nil {
		addresses["metrics"] = watched.Addr().String()
		m := &http.Server{Handler: g.Observability(), ReadHeaderTimeout: 10 * time.Second}
		defer m.Close()
		go func() {
			if err := m.Serve(watched); !errors.Is(err, http.ErrServerClosed) {
				g.log.Error("metrics are not served", "error", err)
			}
		}()
	}
	if err := e.printJSON(addresses); err != nil {
		return errors.Join(err, l.Close(), g.close())
	}
	systemd.ready()
	err = g.Serve(interrupted(c), l)
	systemd.stopping()
	return errors.Join(err, g.close())
}
