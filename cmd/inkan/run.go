package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"inkan/confine"
	"inkan/internal/problem"
	"inkan/scope"
	"inkan/signer/client"
)

func runCommand(e *env) *cli.Command {
	var parts []string
	for _, p := range confine.Parts {
		parts = append(parts, string(p))
	}
	return &cli.Command{
		Name:      "run",
		Usage:     "start an agent, confined to the os section of its scope, with a connection to its signer",
		ArgsUsage: "-- program [arguments]",
		Flags: []cli.Flag{
			socketFlag(), jsonFlag(),
			&cli.StringFlag{Name: "agent", Usage: "`NAME` of the agent; the signer must have this command among its launchers"},
			&cli.StringFlag{Name: "scope", Usage: "confine by the scope in this `FILE`, without a signer: to try an os section out"},
			&cli.StringSliceFlag{Name: "file", Usage: "`FILE` that makes the program what it is, such as a script, model or prompt; may be given several times"},
			&cli.IntFlag{Name: "require-landlock-abi", Usage: "refuse under a kernel with an older Landlock than this `ABI`"},
			&cli.StringSliceFlag{Name: "optional", Usage: "go on without this `PART` where the kernel cannot enforce it: " + strings.Join(parts, ", ") + "; may be given several times"},
			&cli.BoolFlag{Name: "check", Usage: "start nothing: say what would be started, and print its os.start entry"},
		},
		Action: func(c *cli.Context) error { return runAgent(e, c) },
	}
}

// runAgent becomes the program; it returns only if it could not.
func runAgent(e *env, c *cli.Context) error {
	if !c.Args().Present() {
		return usage("the program is missing: inkan run --agent NAME -- program arguments")
	}
	agent, file := c.String("agent"), c.String("scope")
	if (agent == "") == (file == "") {
		return usage("--agent or --scope is expected, and not both")
	}
	o := confine.Options{Args: c.Args().Slice(), Files: c.StringSlice("file"), Environ: os.Environ(), RequireABI: c.Int("require-landlock-abi")}
	for _, p := range c.StringSlice("optional") {
		o.Optional = append(o.Optional, confine.Part(p))
	}
	var launch *client.Launch
	if agent != "" {
		var err error
		if launch, err = client.NewLaunch(c.String("socket"), agent); err != nil {
			return refusedStart(err)
		}
		defer launch.Close()
		o.OS, o.Protected = launch.OS, launch.Protected
	} else {
		b, err := e.readInput(file, scope.MaxScope)
		if err != nil {
			return err
		}
		s, err := scope.ParseYAML(b)
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		o.OS = s.OS()
	}
	var err error
	if o.Supervisor, err = confine.Supervisor(); err != nil {
		return err
	}
	if o.Supervisor == nil && !c.Bool("check") && confine.NeedsSupervisor(o.OS) {
		if launch != nil {
			launch.Close() // the child makes its own: the signer binds it to that process
		}
		code, err := confine.Supervise(o.OS)
		if err != nil || code == 0 {
			return err
		}
		return &exit{code: code} // the child has said why
	}
	start, err := confine.Prepare(o)
	if err != nil {
		return refusedStart(err)
	}
	defer start.Close()
	if c.Bool("check") {
		return e.showStart(c, start)
	}
	var connection *os.File
	if launch != nil {
		req := client.StartRequest{Executable: start.Path, Files: append([]string{}, start.FilePaths...), Args: start.Args, Landlock: start.ABI}
		for _, p := range start.Unenforced {
			req.Unenforced = append(req.Unenforced, string(p))
		}
		if _, err := launch.Start(req, append([]*os.File{start.Executable}, start.Files...)); err != nil {
			return refusedStart(err)
		}
		if connection, err = launch.Connection(); err != nil {
			return err
		}
	}
	return start.Exec(connection)
}

// refusedStart gives the refusal of a start its exit code.
func refusedStart(err error) error {
	if r, ok := errors.AsType[*confine.Refusal](err); ok {
		return withCode(exitRefused, r)
	}
	if p, ok := errors.AsType[*problem.Problem](err); ok && p.Rule != "" {
		return withCode(exitRefused, err)
	}
	return err
}

// showStart prints what would be started.
func (e *env) showStart(c *cli.Context, s *confine.Start) error {
	exe, err := s.Measure()
	if err != nil {
		return err
	}
	entry := scope.Start{Executable: hex.EncodeToString(exe[0][:])}
	for i, p := range s.FilePaths {
		entry.Files = append(entry.Files, scope.StartFile{Path: p, SHA256: hex.EncodeToString(exe[i+1][:])})
	}
	return e.show(c, map[string]any{"executable": s.Path, "start": entry, "landlock_abi": s.ABI, "unenforced": append([]confine.Part{}, s.Unenforced...)}, func() {
		e.printf("# %s, Landlock ABI %d\n- executable_sha256: \"%s\"\n", s.Path, s.ABI, entry.Executable)
		if len(entry.Files) > 0 {
			e.printf("  files:\n")
		}
		for _, f := range entry.Files {
			e.printf("    - {path: %s, sha256: \"%s\"}\n", f.Path, f.SHA256)
		}
		for _, p := range s.Unenforced {
			e.printf("# not enforced by this kernel: %s\n", p)
		}
	})
}
