package proxy

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"inkan/internal/caller"
	"inkan/internal/strictjson"
	"inkan/wire"
)

// maxConfig bounds a configuration file, in bytes.
const maxConfig = 256 << 10

// Config is a proxy's configuration file.
type Config struct {
	StateDir      string        `json:"state_dir"`                 // the signer's: certificates, and keys that are in the TPM
	TPM           string        `json:"tpm,omitempty"`             // /dev/tpmrm0, or the socket of a software TPM
	OwnerAuthFile string        `json:"owner_auth_file,omitempty"` // of the TPM's owner hierarchy, if it has an authorization
	CA            string        `json:"ca"`                        // PEM file with the issuer's CA certificate
	ServerCA      string        `json:"server_ca"`                 // PEM file with what servers' certificates chain to
	MetricsListen string        `json:"metrics_listen,omitempty"`  // host:port; empty: none
	Agents        []AgentConfig `json:"agents"`
	Sandbox       Sandbox       `json:"sandbox,omitzero"`
}

// AgentConfig is an agent that the proxy connects as.
type AgentConfig struct {
	Name      string           `json:"name"`
	TLSKey    string           `json:"tls_key,omitempty"` // pkcs11: URI of the TLS key; without one it is in the TPM
	Listeners []ListenerConfig `json:"listeners"`
}

// ListenerConfig is where an agent connects.
type ListenerConfig struct {
	Listen         string   `json:"listen"`                   // 127.0.0.1:8080, or unix:/path
	Protocol       string   `json:"protocol"`                 // http or tcp
	Upstream       string   `json:"upstream,omitempty"`       // host:port where all goes; http without one: where the request says
	Callers        []Caller `json:"callers"`                  // who may use it
	MaxConnections int      `json:"max_connections,omitzero"` // at a time; 256 by default
	MaxBody        int64    `json:"max_body,omitzero"`        // http: bytes of a request's body; 1 MiB by default
	AnswerTimeout  string   `json:"answer_timeout,omitempty"` // http: until the answer begins; 60s by default
	SignRequests   bool     `json:"sign_requests,omitzero"`   // http: sign those that carry an action with the TLS key too (RFC 9421)
	IdleTimeout    string   `json:"idle_timeout,omitempty"`   // tcp: without a byte either way; none by default
	answer, idle   time.Duration
	host           string
	port           uint16
}

// Caller is who may use a listener: all members that are given must hold.
type Caller struct {
	User string `json:"user"`           // name or number
	Unit string `json:"unit,omitempty"` // systemd unit; on a unix socket alone

	uid uint32
}

// Sandbox says what the proxy's process keeps beyond what its configuration shows it to need.
type Sandbox struct {
	Read     []string `json:"read,omitempty"`     // files and directories, for a PKCS#11 module
	Write    []string `json:"write,omitempty"`    // likewise
	Ports    []uint16 `json:"ports,omitempty"`    // TCP ports to connect to, likewise
	Unix     []string `json:"unix,omitempty"`     // unix sockets to connect to, likewise
	Optional []string `json:"optional,omitempty"` // parts to go on without where the kernel cannot enforce them
}

// ByUnit says whether some caller is told by its systemd unit.
func (c *Config) ByUnit() bool {
	for _, a := range c.Agents {
		for _, l := range a.Listeners {
			for _, x := range l.Callers {
				if x.Unit != "" {
					return true
				}
			}
		}
	}
	return false
}

// Protocols of a listener.
const (
	HTTP = "http"
	TCP  = "tcp"
)

// ParseConfig reads a configuration file, strictly. Relative paths are below dir.
func ParseConfig(b []byte, dir string) (*Config, error) {
	var c Config
	err := strictjson.UnmarshalYAML(b, maxConfig, &c)
	if err == nil {
		err = c.validate(dir)
	}
	if err != nil {
		return nil, fmt.Errorf("proxy configuration: %w", err)
	}
	return &c, nil
}

func (c *Config) validate(dir string) error {
	for _, m := range []struct{ name, value string }{{"state_dir", c.StateDir}, {"ca", c.CA}, {"server_ca", c.ServerCA}} {
		if m.value == "" {
			return fmt.Errorf("%s is missing", m.name)
		}
	}
	for _, p := range []*string{&c.StateDir, &c.TPM, &c.OwnerAuthFile, &c.CA, &c.ServerCA} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	for _, list := range [][]string{c.Sandbox.Read, c.Sandbox.Write, c.Sandbox.Unix} {
		for _, p := range list {
			if !filepath.IsAbs(p) {
				return fmt.Errorf("sandbox: %.80q: an absolute path is expected", p)
			}
		}
	}
	if len(c.Agents) == 0 {
		return errors.New("agents is empty")
	}
	names, addresses := make(map[string]bool), make(map[string]bool)
	for i := range c.Agents {
		a := &c.Agents[i]
		switch {
		case a.Name == "" || len(a.Name) > 63 || strings.Trim(a.Name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "":
			return fmt.Errorf("agent name %.80q: 1 to 63 lower-case letters, digits and dashes are expected", a.Name)
		case names[a.Name]:
			return fmt.Errorf("agent %s stands twice", a.Name)
		case a.TLSKey != "" && !strings.HasPrefix(a.TLSKey, "pkcs11:"):
			return fmt.Errorf("agent %s: tls_key %.32q: a pkcs11: URI is expected; without one the key is in the TPM", a.Name, a.TLSKey)
		case a.TLSKey == "" && c.TPM == "":
			return fmt.Errorf("agent %s: tpm is missing, and the agent has no tls_key", a.Name)
		case len(a.Listeners) == 0:
			return fmt.Errorf("agent %s: listeners is empty", a.Name)
		}
		names[a.Name] = true
		for j := range a.Listeners {
			l := &a.Listeners[j]
			if err := l.validate(); err != nil {
				return fmt.Errorf("agent %s: listener %d: %w", a.Name, j+1, err)
			}
			if addresses[l.Listen] && !strings.HasSuffix(l.Listen, ":0") {
				return fmt.Errorf("agent %s: %s stands twice", a.Name, l.Listen)
			}
			addresses[l.Listen] = true
		}
	}
	return nil
}

func (l *ListenerConfig) validate() error {
	path, isUnix := strings.CutPrefix(l.Listen, "unix:")
	if isUnix && !filepath.IsAbs(path) {
		return fmt.Errorf("listen %.80q: after unix: an absolute path is expected", l.Listen)
	}
	if !isUnix {
		a, err := netip.ParseAddrPort(l.Listen)
		if err != nil || !a.Addr().IsLoopback() || a.Addr().Zone() != "" {
			return fmt.Errorf("listen %.80q: a loopback address and a port such as 127.0.0.1:8080 are expected, or unix:/path", l.Listen)
		}
	}
	if l.Protocol != HTTP && l.Protocol != TCP {
		return fmt.Errorf("protocol %.16q: http or tcp is expected", l.Protocol)
	}
	if l.Upstream != "" {
		var err error
		if _, _, err = net.SplitHostPort(l.Upstream); err == nil {
			l.host, l.port, err = wire.HostPort(l.Upstream)
		}
		if err != nil {
			return fmt.Errorf("upstream %.128q: host:port is expected", l.Upstream)
		}
	} else if l.Protocol == TCP {
		return errors.New("upstream is missing: bytes do not say where they go")
	}
	if l.SignRequests && l.Protocol != HTTP {
		return errors.New("sign_requests is for the protocol http")
	}
	if l.MaxConnections == 0 {
		l.MaxConnections = 256
	}
	if l.MaxBody == 0 {
		l.MaxBody = 1 << 20
	}
	if l.MaxConnections < 1 || l.MaxConnections > 65536 || l.MaxBody < 1 || l.MaxBody > 1<<30 {
		return errors.New("max_connections of 1 to 65536 and max_body of 1 to 1073741824 are expected")
	}
	for _, d := range []struct {
		name, text string
		to         *time.Duration
		standard   time.Duration
	}{{"answer_timeout", l.AnswerTimeout, &l.answer, time.Minute}, {"idle_timeout", l.IdleTimeout, &l.idle, 0}} {
		if *d.to = d.standard; d.text == "" {
			continue
		}
		v, err := time.ParseDuration(d.text)
		if err != nil || v < time.Second || v > 24*time.Hour {
			return fmt.Errorf("%s %.16q: 1s to 24h is expected", d.name, d.text)
		}
		*d.to = v
	}
	if len(l.Callers) == 0 {
		return errors.New("callers is empty, so nobody could use it")
	}
	for i := range l.Callers {
		if err := l.Callers[i].validate(isUnix); err != nil {
			return fmt.Errorf("caller %d: %w", i+1, err)
		}
	}
	return nil
}

func (c *Caller) validate(isUnix bool) error {
	if c.User == "" {
		return errors.New("user is missing")
	}
	if c.Unit != "" && !isUnix {
		return errors.New("unit needs a unix socket: of a TCP connection the kernel tells the user alone")
	}
	n, err := strconv.ParseUint(c.User, 10, 32)
	if err != nil {
		u, lookup := user.Lookup(c.User)
		if lookup != nil {
			return fmt.Errorf("user %.64q: %w", c.User, lookup)
		}
		if n, err = strconv.ParseUint(u.Uid, 10, 32); err != nil {
			return fmt.Errorf("user %.64q: %w", c.User, err)
		}
	}
	c.uid = uint32(n)
	return nil
}

// allows says whether a process may use the listener.
func (l *ListenerConfig) allows(uid uint32, p *caller.Process) error {
	why := fmt.Sprintf("user %d is none of the listener's callers", uid)
	for _, c := range l.Callers {
		if c.uid != uid {
			continue
		}
		if c.Unit == "" {
			return nil
		}
		unit, err := p.Unit()
		if err != nil {
			return unidentified(err)
		}
		if unit == c.Unit {
			return nil
		}
		why = fmt.Sprintf("user %d in unit %q is none of the listener's callers", uid, unit)
	}
	return refuse(RuleCaller, "%s", why)
}
