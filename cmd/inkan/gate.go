package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/urfave/cli/v2"

	"inkan/internal/strictjson"
	"inkan/verify"
	"inkan/verify/gate"
	"inkan/verify/message"
	"inkan/verify/source"
)

// gateConfig is a gate's configuration file.
type gateConfig struct {
	Listen           string              `json:"listen"`                            // host:port
	Certificate      string              `json:"certificate"`                       // PEM file, leaf first; read anew at each handshake
	Key              string              `json:"key"`                               // PEM file
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
}

func gateCommand(e *env) *cli.Command {
	config := []cli.Flag{&cli.StringFlag{Name: "config", Value: "/etc/inkan/gate.yaml", Usage: "configuration `FILE`"}}
	return &cli.Command{
		Name:  "gate",
		Usage: "stand before a venue's HTTP server and let through only what an agent signed",
		Subcommands: []*cli.Command{
			{Name: "serve", Usage: "serve until interrupted", Flags: config, Action: func(c *cli.Context) error { return gateServe(e, c) }},
			{Name: "check", Usage: "check a configuration file and its routes", Flags: config, Action: func(c *cli.Context) error {
				_, _, closer, err := readGate(e, c)
				if err != nil {
					return err
				}
				e.printf("the configuration is valid\n")
				return closer()
			}},
		},
	}
}

// readGate makes a gate of the configuration file. closer closes its replay store.
func readGate(e *env, c *cli.Context) (g *gate.Gate, listen string, closer func() error, err error) {
	path, err := filepath.Abs(c.String("config"))
	if err != nil {
		return nil, "", nil, err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, "", nil, err
	}
	var f gateConfig
	if err := strictjson.UnmarshalYAML(b, 256<<10, &f); err != nil {
		return nil, "", nil, fmt.Errorf("%s: %w", path, err)
	}
	for name, v := range map[string]string{"listen": f.Listen, "certificate": f.Certificate, "key": f.Key, "ca": f.CA, "crl_url": f.CRL, "replay_db": f.ReplayDB, "backend": f.Backend, "routes": f.Routes} {
		if v == "" {
			return nil, "", nil, fmt.Errorf("%s: %s is missing", path, name)
		}
	}
	for _, p := range []*string{&f.Certificate, &f.Key, &f.CA, &f.Routes, &f.Regions} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(filepath.Dir(path), *p)
		}
	}
	if f.Policies != "" && !strings.Contains(f.Policies, "://") && !filepath.IsAbs(f.Policies) {
		f.Policies = filepath.Join(filepath.Dir(path), f.Policies)
	}
	config, err := f.gate()
	if err != nil {
		return nil, "", nil, fmt.Errorf("%s: %w", path, err)
	}
	store, err := openReplay(c.Context, "replay_db", f.ReplayDB, f.ReplayPassword, filepath.Dir(path))
	if err != nil {
		return nil, "", nil, err
	}
	config.Receiver.Replay, config.Log = store, logger(e)
	if g, err = gate.New(*config); err != nil {
		return nil, "", nil, errors.Join(fmt.Errorf("%s: %w", path, err), store.Close())
	}
	return g, f.Listen, store.Close, nil
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
	if fi, err := os.Stat(f.Key); err != nil {
		return nil, err
	} else if fi.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("key %s: others may read it (mode %04o): chmod 600", f.Key, fi.Mode().Perm())
	}
	if _, err := tls.LoadX509KeyPair(f.Certificate, f.Key); err != nil {
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
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(f.Certificate, f.Key)
			return &pair, err
		},
	}
	switch f.RequestSignature {
	case "":
	case "checked", "required":
		config.Receiver.RequestSignature = &verify.RequestSignature{Key: verify.PeerKey, Required: f.RequestSignature == "required"}
	default:
		return nil, fmt.Errorf("request_signature %.16q: checked or required is expected", f.RequestSignature)
	}
	switch {
	case strings.HasPrefix(f.Policies, "https://"), strings.HasPrefix(f.Policies, "http://"):
		config.Receiver.Policies = verify.PolicyURL(f.Policies)
	case f.Policies != "":
		config.Receiver.Policies = &verify.PolicyDir{Path: f.Policies}
	}
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

func gateServe(e *env, c *cli.Context) error {
	g, address, closer, err := readGate(e, c)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return errors.Join(err, closer())
	}
	if err := e.printJSON(map[string]string{"address": l.Addr().String()}); err != nil {
		return errors.Join(err, l.Close(), closer())
	}
	_, _ = daemon.SdNotify(false, daemon.SdNotifyReady) // without systemd there is nobody to tell
	return errors.Join(g.Serve(interrupted(c), l), closer())
}
