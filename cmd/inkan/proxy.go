package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/urfave/cli/v2"

	"inkan/confine"
	"inkan/internal/caller"
	"inkan/wire"
	"inkan/wire/proxy"
)

func proxyCommand(e *env) *cli.Command {
	config := []cli.Flag{&cli.StringFlag{Name: "config", Value: "/etc/inkan/proxy.yaml", Usage: "configuration `FILE`"}}
	return &cli.Command{
		Name:  "proxy",
		Usage: "connect agents to the destinations of their scopes, over TLS with the key in the device",
		Subcommands: []*cli.Command{
			{Name: "serve", Usage: "serve until interrupted", Flags: config, Action: func(c *cli.Context) error { return proxyServe(e, c) }},
			{Name: "check", Usage: "check a configuration file", Flags: append([]cli.Flag{jsonFlag()}, config...), Action: func(c *cli.Context) error {
				if _, err := readProxyConfig(c); err != nil {
					return err
				}
				return e.valid(c)
			}},
		},
	}
}

func readProxyConfig(c *cli.Context) (*proxy.Config, error) {
	path, err := filepath.Abs(c.String("config"))
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return proxy.ParseConfig(b, filepath.Dir(path))
}

// proxies is what a proxy's process has open before it serves.
type proxies struct {
	config     *proxy.Config
	identities map[string]*wire.Identity
	owners     *caller.Owners
	metrics    *proxy.Metrics
	serving    []served
	watched    net.Listener // of metrics; nil: none
	log        *slog.Logger
}

type served struct {
	agent    string
	proxy    *proxy.Proxy
	listener net.Listener
}

func openProxies(config *proxy.Config, log *slog.Logger) (_ *proxies, err error) {
	p := &proxies{config: config, identities: make(map[string]*wire.Identity), log: log}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	roots, err := readPool(config.CA)
	if err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	servers, err := readPool(config.ServerCA)
	if err != nil {
		return nil, fmt.Errorf("server_ca: %w", err)
	}
	var auth []byte
	if config.OwnerAuthFile != "" {
		b, err := os.ReadFile(config.OwnerAuthFile)
		if err != nil {
			return nil, err
		}
		auth = []byte(strings.TrimRight(string(b), "\n"))
	}
	if p.owners, err = caller.NewOwners(); err != nil {
		return nil, err
	}
	for _, a := range config.Agents {
		i, err := wire.Open(wire.Options{Dir: filepath.Join(config.StateDir, a.Name), Roots: roots, TPM: config.TPM, OwnerAuth: auth, Key: a.TLSKey})
		if err != nil {
			return nil, fmt.Errorf("agent %s: %w", a.Name, err)
		}
		p.identities[a.Name] = i
	}
	p.metrics = proxy.NewMetrics(p.identities)
	for _, a := range config.Agents {
		dialer := p.identities[a.Name].Dialer(servers)
		for i := range a.Listeners {
			l, err := a.Listeners[i].Open()
			if err != nil {
				return nil, fmt.Errorf("agent %s: %w", a.Name, err)
			}
			p.serving = append(p.serving, served{a.Name, proxy.New(&a.Listeners[i], a.Name, dialer, p.owners, p.metrics, log), l})
		}
	}
	if config.MetricsListen != "" {
		if p.watched, err = net.Listen("tcp", config.MetricsListen); err != nil {
			return nil, fmt.Errorf("metrics_listen: %w", err)
		}
	}
	return p, nil
}

// close closes the devices; listeners close with their serving.
func (p *proxies) close() error {
	var errs []error
	for _, i := range p.identities {
		errs = append(errs, i.Close())
	}
	if p.owners != nil {
		errs = append(errs, p.owners.Close())
	}
	return errors.Join(errs...)
}

// serve serves all listeners until ctx ends, or one of them fails.
func (p *proxies) serve(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	errs := make([]error, len(p.serving)+1)
	for n, s := range p.serving {
		wg.Go(func() {
			errs[n] = s.proxy.Serve(ctx, s.listener)
			stop()
		})
	}
	if p.watched != nil {
		m := p.metrics.Server()
		wg.Go(func() {
			if err := m.Serve(p.watched); !errors.Is(err, http.ErrServerClosed) {
				errs[len(p.serving)] = err
				stop()
			}
		})
		defer m.Close()
		context.AfterFunc(ctx, func() { _ = m.Close() }) // nobody needs the last numbers
	}
	wg.Wait()
	for i, err := range errs {
		if errors.Is(err, http.ErrServerClosed) {
			errs[i] = nil
		}
	}
	return errors.Join(errs...)
}

// confine leaves the process what it needs from here on. Workers of tokens
// start again, so that they are confined too.
func (p *proxies) confine() error {
	var s sandbox
	c := &p.config.Sandbox
	s.room = confine.Room{Read: slices.Clone(c.Read), Write: slices.Clone(c.Write), Unix: slices.Clone(c.Unix), Ports: slices.Clone(c.Ports)}
	for _, part := range c.Optional {
		s.room.Optional = append(s.room.Optional, confine.Part(part))
	}
	if p.config.TPM != "" {
		if err := s.mayUseTPM(p.config.TPM); err != nil {
			return err
		}
	}
	if p.config.ByUnit() {
		s.room.Read = append(s.room.Read, "/proc")
	}
	for _, a := range p.config.Agents {
		s.room.Read = append(s.room.Read, filepath.Join(p.config.StateDir, a.Name))
		if err := s.mayUseKey(a.TLSKey); err != nil {
			return err
		}
		granted, err := p.identities[a.Name].Scope()
		if err != nil {
			return fmt.Errorf("agent %s: %w", a.Name, err)
		}
		for _, d := range granted.Destinations() {
			s.mayConnect(d.Host, d.Port)
		}
	}
	for _, i := range p.identities {
		i.Pause()
	}
	if err := s.enter(p.log); err != nil {
		return err
	}
	for name, i := range p.identities {
		if err := i.Resume(); err != nil {
			return fmt.Errorf("agent %s: inside the sandbox: %w (sandbox.read, write, unix and ports name what a PKCS#11 module needs)", name, err)
		}
	}
	return nil
}

func proxyServe(e *env, c *cli.Context) error {
	config, err := readProxyConfig(c)
	if err != nil {
		return err
	}
	p, err := openProxies(config, logger(e))
	if err != nil {
		return err
	}
	type listening struct {
		Agent  string `json:"agent"`
		Listen string `json:"listen"`
	}
	var list []listening
	for _, s := range p.serving {
		at := s.listener.Addr().String()
		if s.listener.Addr().Network() == "unix" {
			at = "unix:" + at
		}
		list = append(list, listening{s.agent, at})
	}
	systemd := newNotifier()
	if err := p.confine(); err != nil {
		return errors.Join(err, p.close())
	}
	ready := map[string]any{"listeners": list}
	if p.watched != nil {
		ready["metrics"] = p.watched.Addr().String()
	}
	if err := e.printJSON(ready); err != nil {
		return errors.Join(err, p.close())
	}
	systemd.ready()
	err = p.serve(interrupted(c))
	systemd.stopping()
	return errors.Join(err, p.close())
}
