package client

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"inkan/internal/problem"
	"inkan/internal/strictjson"
	"inkan/scope"
)

// Variable is the environment variable that has the number of the descriptor
// on which a program that inkan run has started reaches its signer.
const Variable = "INKAN_FD"

// ErrNotStarted: the program was not started by inkan run.
var ErrNotStarted = errors.New(Variable + " is not set: the program was not started by inkan run")

// FromEnv returns a client for the connection that this process inherited from
// inkan run. There is one: requests take turns on it, no other process can use
// it, and it cannot be opened again. Call it once.
func FromEnv() (*Client, error) {
	text := os.Getenv(Variable)
	if text == "" {
		return nil, ErrNotStarted
	}
	fd, err := strconv.ParseUint(text, 10, 31)
	if err != nil || fd < 3 {
		return nil, fmt.Errorf("%s is %.16q: the number of a descriptor is expected", Variable, text)
	}
	f := os.NewFile(uintptr(fd), Variable)
	conn, err := net.FileConn(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("%s: %w", Variable, err)
	}
	var used atomic.Bool
	return &Client{base: "http://signer", http: &http.Client{Timeout: 2 * time.Minute, Transport: &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			if used.Swap(true) {
				return nil, errors.New("the signer has closed the connection, which is made at the start: start the agent again")
			}
			return conn, nil
		},
		MaxConnsPerHost: 1, MaxIdleConnsPerHost: 1, DisableCompression: true,
	}}}, nil
}

// Launch is a launcher's connection to the signer, before it is an agent's.
type Launch struct {
	OS        *scope.OS // of the agent's scope: what to confine it to
	Protected []string  // the signer's paths, which no agent may reach

	agent string
	conn  *net.UnixConn
	r     *bufio.Reader
}

// launchTimeout bounds a start; measuring large files takes its time.
const launchTimeout = 10 * time.Minute

// NewLaunch connects to the signer's socket and asks what the agent is to be
// confined to. The calling process must be one of the agent's launchers. Close it.
func NewLaunch(socket, agent string) (_ *Launch, err error) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return nil, unanswered(err)
	}
	l := &Launch{agent: agent, conn: c.(*net.UnixConn), r: bufio.NewReader(c)}
	defer func() {
		if err != nil {
			l.Close()
		}
	}()
	if err := l.conn.SetDeadline(time.Now().Add(launchTimeout)); err != nil {
		return nil, err
	}
	req, err := http.NewRequest(http.MethodGet, "http://signer/v1/starts/"+url.PathEscape(agent), nil)
	if err != nil {
		return nil, err
	}
	if err := req.Write(l.conn); err != nil {
		return nil, fmt.Errorf("asking the signer: %w", err)
	}
	var offer struct {
		OS        string   `json:"os"`
		Protected []string `json:"protected"`
	}
	if err := l.answer(req, &offer); err != nil {
		return nil, err
	}
	l.Protected = offer.Protected
	l.OS, err = scope.ParseOS([]byte(offer.OS))
	return l, err
}

// Close closes the connection.
func (l *Launch) Close() { _ = l.conn.Close() }

// answer reads a response. A refusal is a *[problem.Problem].
func (l *Launch) answer(req *http.Request, out any) error {
	res, err := http.ReadResponse(l.r, req)
	if err != nil {
		return fmt.Errorf("reading the signer's answer: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode == http.StatusSwitchingProtocols {
		return nil
	}
	b, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	if err != nil {
		return fmt.Errorf("reading the signer's answer: %w", err)
	}
	if res.StatusCode != http.StatusOK {
		return problem.Parse(res.StatusCode, res.Header.Get("Content-Type"), b)
	}
	if out == nil {
		return errors.New("the signer did not go on with the start")
	}
	return strictjson.Unmarshal(b, maxAnswer, out)
}

// StartRequest is what a launcher says about a start: docs/confinement.md.
type StartRequest struct {
	Agent      string       `json:"agent"`
	Executable string       `json:"executable"`
	Files      []string     `json:"files"`
	Args       []string     `json:"args"`
	OS         scope.Digest `json:"os"`
	Landlock   int          `json:"landlock_abi"`
	Unenforced []string     `json:"unenforced,omitempty"`
}

// Started is a start that the signer allowed.
type Started struct {
	Start    scope.Digest        `json:"start"` // of the document
	Document scope.StartDocument `json:"document"`
}

// Start has the signer measure the files, the executable first, and bind the
// connection to the calling process, which then must become the program.
func (l *Launch) Start(r StartRequest, files []*os.File) (*Started, error) {
	r.Agent, r.OS = l.agent, l.OS.Digest()
	b, err := strictjson.Marshal(r)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequest(http.MethodPost, "http://signer/v1/starts", bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "inkan-start")
	if err := req.Write(l.conn); err != nil {
		return nil, fmt.Errorf("asking the signer: %w", err)
	}
	if err := l.answer(req, nil); err != nil {
		return nil, err
	}
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = int(f.Fd())
	}
	if _, _, err := l.conn.WriteMsgUnix([]byte{0}, syscall.UnixRights(fds...), nil); err != nil {
		return nil, fmt.Errorf("asking the signer: %w", err)
	}
	var out Started
	if err := l.answer(req, &out); err != nil {
		return nil, err
	}
	if l.r.Buffered() > 0 {
		return nil, errors.New("the signer sent more than its answer")
	}
	return &out, nil
}

// Connection returns the descriptor that the program inherits. Close it.
func (l *Launch) Connection() (*os.File, error) { return l.conn.File() }
