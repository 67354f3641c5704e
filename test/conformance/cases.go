package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// cases asks the suite which of its cases match.
func (j *judge) cases(ctx context.Context, focus, skip string) ([]string, error) {
	dir, err := os.MkdirTemp("", "conformance")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	list := filepath.Join(dir, "cases.json")
	args := []string{"--ginkgo.dry-run", "--ginkgo.focus=" + focus, "--ginkgo.json-report=" + list}
	if skip != "" {
		args = append(args, "--ginkgo.skip="+skip)
	}
	if out, err := exec.CommandContext(ctx, j.program("e2e.test"), args...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("list the cases: %s: %w", out[max(0, len(out)-1000):], err)
	}
	data, err := os.ReadFile(list)
	if err != nil {
		return nil, err
	}
	var suites []struct {
		SpecReports []struct {
			ContainerHierarchyTexts []string
			LeafNodeType            string
			LeafNodeText            string
			State                   string
		}
	}
	if err := json.Unmarshal(data, &suites); err != nil {
		return nil, fmt.Errorf("read the list of cases: %w", err)
	}
	var names []string
	for _, s := range suites {
		for _, r := range s.SpecReports {
			if r.LeafNodeType == "It" && r.State == "passed" {
				names = append(names, strings.Join(append(r.ContainerHierarchyTexts, r.LeafNodeText), " "))
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// sample takes n cases of each area, spread over it: an area is a feature, and
// a few cases tell whether it works at all.
func sample(cases []string, n int) (some []string) {
	areas := map[string][]string{}
	for _, c := range cases {
		areas[areaOf(c)] = append(areas[areaOf(c)], c)
	}
	for _, of := range areas {
		take := min(n, len(of))
		for i := range take {
			some = append(some, of[i*len(of)/take])
		}
	}
	slices.Sort(some)
	return some
}

// part is the i-th of n parts, dealt one by one so that slow neighbours part.
func part(cases []string, shard string) ([]string, error) {
	if shard == "" {
		return cases, nil
	}
	var i, n int
	if _, err := fmt.Sscanf(shard, "%d/%d", &i, &n); err != nil || i < 1 || i > n {
		return nil, fmt.Errorf("shard %s: want i/n, from 1/n to n/n", shard)
	}
	var mine []string
	for k := i - 1; k < len(cases); k += n {
		mine = append(mine, cases[k])
	}
	return mine, nil
}
